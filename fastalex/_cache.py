"""The files kept between processes: in the cache folder, the user's alone, and read with distrust."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

#: No file that we write is nearly as large.
LARGEST = 64 << 20


def folder() -> Path:
    """$FASTALEX_CACHE_DIR, by default ~/.cache/fastalex."""
    asked = os.environ.get("FASTALEX_CACHE_DIR")
    return Path(asked) if asked else Path.home() / ".cache" / "fastalex"


def read(path: Path) -> bytes:
    """The bytes of a file that nobody else can have written.

    Raises:
        FileNotFoundError: where there is none.
        OSError, ValueError: where it is a link, no file, too large, or could have been written by another user.
    """
    # Neither through a link, nor waiting for the other end of a pipe.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if hasattr(os, "getuid") and (
            status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        ):
            raise ValueError("another user could have written it")
        if status.st_size > LARGEST:
            raise ValueError(f"it has {status.st_size} bytes; ours have at most {LARGEST}")
        return file.read(LARGEST)


def write(path: Path, content: bytes) -> None:
    """Replaces the file in one step: another process reads the old or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=path.name
    )  # the user's alone: 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
