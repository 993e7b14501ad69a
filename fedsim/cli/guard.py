"""How the command ends: which exit status, and which sentence on standard error.

0: done. 1: a run failed, or a bug. 2: the input is wrong, and nothing was written. 130, 143: an
interrupt (Ctrl-C, SIGTERM). 141: whoever read the output went away.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsim.cli.interrupt import Interrupts

BROKEN_PIPE = 141  # 128 + SIGPIPE, as from a program that the signal ends


def open_streams() -> None:
    """Opens the standard streams that the caller closed (`fedsim list >&-`) on nothing.

    Otherwise Python has no sys.stdout, and the next file to be opened gets its number.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def execute(arguments: Sequence[str], interrupts: Interrupts | None = None) -> int:
    """Runs the command line and returns its exit status; says on standard error what went wrong.

    Does not return after an interrupt: worker threads may still compute, and nobody waits for them.
    """
    debug = "--debug" in arguments or os.environ.get("FEDSIM_DEBUG", "") not in ("", "0")
    try:
        status = _run(list(arguments))
        if interrupts is not None and interrupts.signal:
            interrupts.end()  # typer makes an exit status of it
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except SystemExit as error:
        # How click and rich take a broken pipe.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        _drop_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        if interrupts is not None:
            interrupts.end()
        return 130
    except Exception as error:
        if interrupts is not None and interrupts.signal:
            interrupts.end()  # what was interrupted may raise anything
        if debug:
            traceback.print_exc()
        return _explain(error, debug)


def _explain(error: Exception, debug: bool) -> int:
    """Says what went wrong and returns the exit status."""
    from fedsim.errors import FedsimError  # takes pydantic along: not at start-up

    if isinstance(error, FedsimError):
        _complain(str(error))
        return error.exit_status
    _complain(f"{type(error).__name__}: {error}")
    _complain("this is a bug" + ("" if debug else "; FEDSIM_DEBUG=1 shows where"))
    return 1


def _run(arguments: list[str]) -> int:
    """Returns the exit status; typer's own mistakes are shown as typer shows them."""
    import click

    from fedsim.cli.app import app

    # A model, client or data set may be a module in the folder that one works in; appended, so
    # that it hides nothing that is installed.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        status = app(arguments, prog_name="fedsim", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as error:
        raise KeyboardInterrupt from error
    return status if isinstance(status, int) else 0


def _complain(message: str) -> None:
    print(f"fedsim: {message}", file=sys.stderr)  # noqa: T201


def _drop_output() -> None:
    """Leaves Python nothing to flush into the broken pipe when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
