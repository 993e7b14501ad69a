"""The command in a process of its own: python -m tests.e2e.command ARGUMENTS."""

from fedsim.cli import main

if __name__ == "__main__":
    main()
