"""Rewrite safetensors files tensor by tensor: rename, replace and drop, at constant memory.

A packed weight has the same bytes in every spelling, so an export copies bytes in pieces under a
new header; a file in which nothing changes is linked.
"""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from safetensors import safe_open

from scalesweep_hf.checkpoint import Entry, read_entries

PIECE = 1 << 22  # bytes copied at a time


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor.

    Attributes:
        name: its new name; None drops it.
        shape: its new shape, of as many elements; None keeps it.
        data: its new bytes, as many as before; None keeps them.
    """

    name: str | None
    shape: tuple[int, ...] | None = None
    data: bytes | None = None


def write_shard(source: Path, target: Path, changes: Mapping[str, Change]) -> dict[str, int]:
    """Write a safetensors file like another but for some tensors.

    Args:
        source: file to read; stays as it is. Linked if nothing in it changes.
        target: file to make.
        changes: by the name of the tensor; others are kept.

    Returns:
        Bytes of every tensor written, by its new name.

    Raises:
        ValueError: two tensors get one name.
    """
    entries = read_entries(source)
    if not changes.keys() & entries.keys():
        link_or_copy(source, target)
        return {name: entry.end - entry.start for name, entry in entries.items()}
    kept = [(entry, changes.get(name, Change(name))) for name, entry in entries.items()]
    kept = [(entry, change) for entry, change in kept if change.name is not None]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    sizes: dict[str, int] = {}
    offset = 0
    for entry, change in kept:
        assert change.name is not None
        if change.name in header:
            raise ValueError(f"{source} would store {change.name} twice: two tensors get that name")
        end = offset + entry.end - entry.start
        shape = entry.shape if change.shape is None else change.shape
        header[change.name] = {
            "dtype": entry.dtype,
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        sizes[change.name] = end - offset
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as read, target.open("wb") as write:
        write.write(struct.pack("<Q", len(text)) + text)
        for entry, change in kept:
            if change.data is None:
                _copy(read, write, entry)
            else:
                assert len(change.data) == entry.end - entry.start
                write.write(change.data)
    return sizes


def check_shard(source: Path, target: Path, changes: Mapping[str, Change]) -> None:
    """Read a file that `write_shard` wrote back, with the safetensors library and byte by byte.

    Raises:
        ValueError: a tensor is not what it should be; names it.
    """
    if target.samefile(source):
        return
    expected = {}
    for name, entry in read_entries(source).items():
        change = changes.get(name, Change(name))
        if change.name is not None:
            expected[change.name] = (entry, change)
    with safe_open(target, framework="pt") as opened:
        if set(opened.keys()) != set(expected):
            raise ValueError(f"{target} does not hold the tensors that were written: disk full?")
        for name, (entry, change) in expected.items():
            part = opened.get_slice(name)
            shape = entry.shape if change.shape is None else change.shape
            found = (part.get_dtype(), tuple(part.get_shape()))
            if found != (entry.dtype, shape):
                raise ValueError(f"{target}: {name} is {found}, expected {(entry.dtype, shape)}")
    written = read_entries(target)
    with source.open("rb") as first, target.open("rb") as second:
        for name, (entry, change) in expected.items():
            if not _same(first, entry, second, written[name], change.data):
                raise ValueError(f"{target}: {name} reads back other bytes than were written")


def link_or_copy(source: Path, target: Path) -> None:
    """Make a second name of a file, or a copy where the file system has no links."""
    source = source.resolve()  # a cache of the Hub holds symbolic links
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _copy(read: BinaryIO, write: BinaryIO, entry: Entry) -> None:
    read.seek(entry.start)
    left = entry.end - entry.start
    while left:
        piece = read.read(min(PIECE, left))
        if not piece:
            raise ValueError("the file became shorter while it was read")
        write.write(piece)
        left -= len(piece)


def _same(
    first: BinaryIO, before: Entry, second: BinaryIO, after: Entry, data: bytes | None
) -> bool:
    second.seek(after.start)
    size = after.end - after.start
    if data is not None:
        return second.read(size) == data
    first.seek(before.start)
    while size:
        piece = min(PIECE, size)
        if first.read(piece) != second.read(piece):
            return False
        size -= piece
    return True
