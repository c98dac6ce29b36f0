"""Write files that appear under their name only when they are whole."""

from collections.abc import Callable
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
