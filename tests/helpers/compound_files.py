"""Compound files (OLE), such as Outlook's messages: storages and streams, written in sectors of 512 bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from itertools import pairwise
from typing import Union

__all__ = ["Tree", "compound_file", "outlook_message"]

Tree = Mapping[str, Union[bytes, "Tree"]]

_FREE, _END, _FAT = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD
_CUTOFF = 4096


def compound_file(tree: Tree) -> bytes:
    """Return a compound file with a tree of storages and streams."""
    entries: list[dict[str, object]] = [{"name": "Root Entry", "kind": 5, "data": b""}]

    def add(children: Tree) -> int:
        """Add entries and return the first, from which the others hang to the right."""
        numbers = []
        for name in sorted(children, key=lambda name: (len(name), name.upper())):
            child = children[name]
            numbers.append(len(entries))
            entries.append({"name": name, "kind": 2 if isinstance(child, bytes) else 1, "data": child})
            if not isinstance(child, bytes):
                entries[numbers[-1]]["child"] = add(child)
        for one, other in pairwise(numbers):
            entries[one]["right"] = other
        return numbers[0] if numbers else _FREE

    entries[0]["child"] = add(tree)
    sectors: list[bytes] = []
    table: list[int] = []
    small, small_table = b"", []  # streams below the cutoff share one, in sectors of 64 bytes

    def store(data: bytes) -> int:
        first = len(sectors)
        pieces = [data[at : at + 512].ljust(512, b"\0") for at in range(0, len(data), 512)]
        sectors.extend(pieces)
        table.extend([*range(first + 1, first + len(pieces)), _END] if pieces else [])
        return first if pieces else _END

    for entry in entries[1:]:
        data = entry["data"]
        if isinstance(data, bytes):
            entry["size"] = len(data)
            if len(data) >= _CUTOFF:
                entry["start"] = store(data)
            else:
                entry["start"] = len(small_table) if data else _END
                pieces = -(-len(data) // 64)
                small_table += [*range(len(small_table) + 1, len(small_table) + pieces), _END] if pieces else []
                small += data.ljust(pieces * 64, b"\0")
    entries[0]["start"], entries[0]["size"] = store(small), len(small)
    small_fat = store(b"".join(struct.pack("<I", number) for number in small_table))
    directory = b"".join(
        str(entry["name"]).encode("utf-16-le").ljust(64, b"\0")
        + struct.pack(
            "<HBBIII",
            2 * len(str(entry["name"])) + 2,
            entry["kind"],
            1,
            _FREE,
            entry.get("right", _FREE),
            entry.get("child", _FREE),
        )
        + bytes(36)
        + struct.pack("<IQ", entry.get("start", 0), entry.get("size", 0))
        for entry in entries
    )
    first_directory = store(directory)
    fat_sectors = 1
    while (len(table) + fat_sectors) > fat_sectors * 128:
        fat_sectors += 1
    first_fat = len(sectors)
    table += [_FAT] * fat_sectors
    fat = b"".join(struct.pack("<I", number) for number in table).ljust(fat_sectors * 512, b"\xff")
    header = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(16)
    header += struct.pack("<HHHHH", 0x3E, 3, 0xFFFE, 9, 6) + bytes(6)
    header += struct.pack(
        "<IIIIIIIIII",
        0,
        fat_sectors,
        first_directory,
        0,
        _CUTOFF,
        small_fat,
        -(-len(small_table) // 128),
        _END,
        0,
        first_fat,
    )
    header += b"".join(struct.pack("<I", first_fat + number) for number in range(1, fat_sectors))
    return header.ljust(512, b"\xff") + b"".join(sectors) + fat


def outlook_message(
    properties: Mapping[str, str | bytes],
    *,
    fixed: Mapping[int, bytes] | None = None,
    attachments: list[Tree] | None = None,
    within: bool = False,
) -> dict[str, bytes | Tree]:
    """Return the tree of a message.

    Args:
        properties: Texts by tag ("0037"), or contents by tag and type ("10130102").
        fixed: Values of eight bytes by tag.
        attachments: The storages of attachments.
        within: Whether it is attached to another message.
    """
    tree: dict[str, bytes | Tree] = {}
    for tag, value in properties.items():
        if isinstance(value, str):
            tree[f"__substg1.0_{tag}001F"] = value.encode("utf-16-le")
        else:
            tree[f"__substg1.0_{tag}"] = value
    entries = b"".join(struct.pack("<HHI", 0x40, tag, 6) + value for tag, value in (fixed or {}).items())
    tree["__properties_version1.0"] = bytes(24 if within else 32) + entries
    for number, attachment in enumerate(attachments or []):
        tree[f"__attach_version1.0_#{number:08X}"] = attachment
    return tree
