"""The command `fedsim`.

Modules at this level import nothing heavy: `fedsim --help` must answer at once. Each command
imports what it needs when it is called.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line of this process and ends with its exit status."""
    from fedsim.cli.guard import execute, open_streams
    from fedsim.cli.interrupt import Interrupts

    open_streams()
    with Interrupts() as interrupts:
        status = execute(sys.argv[1:], interrupts)
    sys.exit(status)
