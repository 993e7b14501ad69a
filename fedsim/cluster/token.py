"""The secret that Ray asks of everybody who talks to a cluster."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fedsim.runs.files import disk_errors

BYTES = 32
"""As many as Ray's own generator takes."""


def new_token(path: Path) -> None:
    """Writes a new token to `path`, readable by the user alone, in place of what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(BYTES))
        temporary.replace(path)


def shared_token() -> Path:
    """Returns where Ray looks for a token by itself; makes one if there is none.

    Ray's launcher copies this file to every node (`file_mounts`). Others lose the right to read it:
    Ray's own generator leaves that to the umask.
    """
    path = Path.home() / ".ray" / "auth_token"
    if not path.is_file():
        new_token(path)
    with disk_errors(path):
        path.chmod(0o600)
    return path
