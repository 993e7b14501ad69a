"""Whether there is a Ray that can do what is asked of it here."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from fedsim.errors import UserError

OLDEST = (2, 52)
"""The first Ray that asks for a token. An older one ignores the settings and lets everybody in."""


def ray_version() -> str:
    """Returns the version of the installed Ray; raises UserError if there is none, or an old one.

    The distribution is asked and not the module: a folder called `ray` where the command is called
    would pass for one.
    """
    try:
        found = version("ray")
    except PackageNotFoundError:
        raise UserError("Ray is not installed: pip install 'fedsim-fl[ray]'") from None
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST:
        raise UserError(
            f"Ray {found} knows no authentication; {'.'.join(map(str, OLDEST))} is the first that"
            " does: pip install -U 'fedsim-fl[ray]'"
        )
    return found
