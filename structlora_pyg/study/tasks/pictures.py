"""Picture files, in a folder or a zip archive, opened when they are needed."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from PIL import Image

from structlora_pyg.study.tasks.rows import DataError

DAMAGED = (OSError, EOFError, SyntaxError, ValueError, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError)


def open_picture(file: Path | str, stream: IO[bytes] | None = None) -> Image.Image:
    """Return a picture in RGB.

    Args:
        file: The file; with `stream`, what errors call it.
        stream: Where to read it from instead.

    Raises:
        DataError: If it is no picture, or damaged.
    """
    try:
        with Image.open(stream or file) as picture:
            return picture.convert("RGB")
    except DAMAGED as error:
        raise DataError(
            file, found=f"an unreadable picture ({error})", expected="a whole JPEG or PNG file; copy it again"
        ) from error


class Pictures:
    """The pictures in a folder or a zip archive.

    Args:
        place: The folder, or the archive.

    Raises:
        DataError: If the archive is damaged.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.archive: zipfile.ZipFile | None = None
        if place.is_file():
            try:
                self.archive = zipfile.ZipFile(place)
            except DAMAGED as error:
                raise DataError(
                    place, found=f"an unreadable archive ({error})", expected="a whole .zip file"
                ) from error

    def check(self, names: Iterable[str]) -> None:
        """Raise a `DataError` for the first picture that is not there, or whose name leads out of the place."""
        there = set(self.archive.namelist()) if self.archive else None
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise DataError(self.place, found=f"the picture {name}", expected="only names of pictures inside of it")
            if not (name in there if there is not None else (self.place / name).is_file()):
                raise DataError(self.place, found=f"no picture {name}", expected="every picture that is asked about")

    def open(self, name: str) -> Image.Image:
        """Return a picture in RGB.

        Raises:
            DataError: If it is missing or damaged.
        """
        if self.archive is None:
            return open_picture(self.place / name)
        try:
            with self.archive.open(name) as stream:
                return open_picture(f"{self.place}, {name}", stream)
        except (KeyError, *DAMAGED) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{self.place}, {name}", found=f"an unreadable picture ({error})", expected="a whole JPEG or PNG file"
            ) from error
