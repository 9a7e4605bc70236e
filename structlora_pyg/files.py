"""Files that are either complete or not there at all, and what to say when they are not."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace_file(path: str | Path, content: str | bytes) -> Path:
    """Write a file beside its place, flush it to disk and move it there in one step.

    A reader, or a run that starts after a crash, sees the old file or the new one, never a part of it.

    Args:
        path: Where the file goes, which is returned; missing parent folders are made.
        content: Text (written as UTF-8) or bytes.

    Raises:
        OSError: If the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    # A name of its own for every writer: two processes may write the same file at once.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def check_writable(folder: str | Path, setting: str) -> None:
    """Make sure that a folder can be made and written to, before any work; nothing is left behind.

    Args:
        folder: The folder, which need not exist.
        setting: What names it, for the error.

    Raises:
        OSError: If it cannot; the message names setting, folder and reason.
    """
    place = Path(folder).expanduser().absolute()
    try:
        there = next(p for p in (place, *place.parents) if p.exists())
        os.rmdir(tempfile.mkdtemp(dir=there))
    except OSError as error:
        raise OSError(f"{setting}={folder} cannot be written to ({error.strerror}); choose another folder") from error


def remove_leftovers(folder: Path) -> None:
    """Remove what `replace_file` left in a folder when its process was killed; nobody else may write there."""
    for file in folder.glob(".*.tmp"):
        if file.is_file():
            file.unlink()


def short(error: BaseException, most: int = 300) -> str:
    """Return the message of an error on one line of at most `most` characters; its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + " ..."
