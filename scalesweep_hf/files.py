"""Write files and folders that appear under their name only when they are whole."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside this one, then rename it; an error removes it."""
    part = file.with_name(file.name + ".part")
    try:
        write(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text, as `write_whole`."""
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))


def check_free(folder: Path) -> None:
    """Refuse to write over anything.

    Raises:
        FileExistsError: the folder exists and is not empty.
    """
    exists = folder.exists()
    if exists and (not folder.is_dir() or any(folder.iterdir()) or folder == Path.cwd()):
        raise FileExistsError(f"{folder} exists: name a new folder, or remove it")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside this one to fill, then rename it; an error removes it.

    Raises:
        FileExistsError: the folder exists and is not empty.
        OSError: it cannot be renamed; what was written stays under the temporary name.
    """
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    try:
        if folder.exists():
            folder.rmdir()
        part.chmod(0o777 & ~_umask())  # temporary folders are private
        part.rename(folder)
    except OSError as error:
        raise OSError(f"all is written to {part}, which cannot become {folder}: {error}") from error


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
