"""Files that are something else than they should be, known by how they begin, or that are called otherwise."""

from __future__ import annotations

import codecs
import difflib
import re
from pathlib import Path

HEAD = 64  # bytes of a file's beginning that tell it

# The order counts: UTF-32's mark begins with that of UTF-16.
_BEGINNINGS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"\x1f\x8b\x08",), "is compressed with gzip; unpack it with gunzip"),
    ((b"\x28\xb5\x2f\xfd",), "is compressed with zstd; unpack it with zstd -d"),
    ((b"\xfd7zXZ\x00",), "is compressed with xz; unpack it with unxz"),
    ((b"BZh",), "is compressed with bzip2; unpack it with bunzip2"),
    ((b"PK\x03\x04",), "is a ZIP archive; unpack it with unzip"),
    ((b"version https://git-lfs",), "is a Git LFS pointer instead of the file; fetch it with git lfs pull"),
    ((b"<!DOCTYPE html", b"<!doctype html", b"<html"), "is a web page; download the file itself"),
    ((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "is UTF-32; save it as UTF-8"),
    ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "is UTF-16; save it as UTF-8"),
    ((b"{\0\0\0", b"[\0\0\0", b"\0\0\0{", b"\0\0\0["), "is UTF-32; save it as UTF-8"),
    ((b"ARROW1",), "is an Arrow (Feather) file; save it as Parquet"),
)
_BINARY = (
    (b"%PDF", "is a PDF; extract its text, and make JSON lines of it"),
    (b"SQLite format 3\0", "is a database of SQLite; export its table as CSV"),
    (b"\x89HDF\r\n", "is an HDF5 file; give a file of requests, such as JSON lines"),
)
_OFFICE = re.compile(rb"PK\x03\x04.{26}(\[Content_Types\]\.xml|mimetypeapplication/vnd\.oasis)", re.DOTALL)
_UTF_16 = re.compile(rb"(?:[\t\n\r -~]\0){4}|(?:\0[\t\n\r -~]){4}|[{\[]\0|\0[{\[]")


def what_it_is(head: bytes) -> str | None:
    """Return the kind of a file that begins with `head`, and what to do, after its name; None if unknown."""
    if _OFFICE.match(head):
        return "is a document of an office program; save its table as CSV"
    known = next((what for beginnings, what in _BEGINNINGS if head.startswith(beginnings)), None)
    return "is UTF-16; save it as UTF-8" if known is None and _UTF_16.match(head) else known


def binary(head: bytes) -> str | None:
    """Return the kind of a file that is no text and begins with `head`, after its name; None if it may be a text."""
    if head.startswith(b"GGUF") or head[5:9] == b"\0\0\0{":  # safetensors begin with a length of eight bytes
        return "is a model; type --model for it, and give a file of requests"
    known = next((what for beginning, what in _BINARY if head.startswith(beginning)), None)
    return known or (
        "is a binary file; give a file of requests, such as JSON lines" if b"\0" in head[:HEAD] else None
    )


def alike(path: Path) -> str | None:
    """Return a question whether a file with a name like that of the missing `path` was meant; None if there is none.

    Of a link without a target it returns that it is one.
    """
    if path.is_symlink():
        return "it is a symbolic link that leads nowhere."
    try:
        beside = [other.name for other in path.parent.iterdir() if other.name != path.name]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
    return f"did you mean {path.parent / close[0]}?" if close else None
