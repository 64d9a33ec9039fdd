"""A seeded fuzzer of the files that hpc-core reads: what strangers, full disks, merges and other programs may leave in their place."""

from __future__ import annotations

import gzip
import json
import random
from typing import Any

ESCAPE = "\x1b]0;owned\x07\x1b[31mred\u202e\x9b2J\r"
WEIRD: list[Any] = [
    None, True, False, 0, -1, 1.5, -0.0, 1e308, 10**18, 2**64, 10**400, float("nan"), float("inf"), -float("inf"),
    "", " ", "1", "../../etc/passwd", "\x00", ESCAPE, "\ud800", "é" * 50, "x" * 5000, [], {}, [[]], {"": {}}, [None],
    ["a", 1], ["a", ESCAPE], [1, 2, 3], {"schema": 1}, {ESCAPE: ESCAPE}, {"\udcff": 1},
]  # fmt: skip
"""Values that are put in place of others."""
TOKENS = [b"NaN", b"Infinity", b"-", b"1e999", b"01", b"[", b"]", b"{", b"}", b",", b'"', b"\\u0000", b"\xff", b"\x00", b"\xef\xbb\xbf", b"\r\n", b"\n\n"]  # fmt: skip
WHOLE = [
    b"", b"\n", b"null", b"[]", b"{}", b"0", b'""', b"\xff\xfe", b"\x1f\x8b", b"PK\x03\x04", b"[" * 50_000, b'{"a":' * 50_000,
    b'{"schema":2}', b'{"schema":"1"}', b'{"schema":-1}', b'{"schema":1e400}', b"<html>", b"\x00" * 100_000, b'{"benchmarks":[]}',
    b'{"accepted":1}', b'{"benchmarks":[{"extra_info":{"record":{"record":[]}}}]}',
]  # fmt: skip
"""Files that have nothing of a record."""


def hostile(text: bytes, draw: random.Random) -> bytes:
    """Return this JSON with one to three things wrong."""
    if draw.random() < 0.05:
        return draw.choice(WHOLE)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        text = _changed(text, draw)
    return text


def hostile_gzip(packed: bytes, draw: random.Random) -> bytes:
    """Return a profile's file that is wrong inside or outside."""
    if draw.random() < 0.3:
        return _bytes_changed(packed, draw)
    return gzip.compress(hostile(gzip.decompress(packed), draw), 1)


def _changed(text: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.25:
        return _bytes_changed(text, draw)
    try:
        lines = [json.loads(line) for line in text.splitlines()] if b"\n{" in text else [json.loads(text)]
    except (ValueError, RecursionError):
        return _bytes_changed(text, draw)
    _structure_changed(lines, draw)
    return b"\n".join(_encoded(line, draw) for line in lines)


def _encoded(value: Any, draw: random.Random) -> bytes:
    return json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def _bytes_changed(text: bytes, draw: random.Random) -> bytes:
    at, end = sorted(draw.randrange(len(text) + 1) for _ in range(2))
    kind = draw.randrange(6)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + text[end:]
    if kind == 2:
        return text[:at] + draw.choice(TOKENS) + text[at:]
    if kind == 3:
        return text[:end] + text[at:end] + text[end:]  # keys twice, objects twice
    if kind == 4 and text:
        changed = bytearray(text)
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    return text[:at] + b'"' + b"[" * draw.choice([1, 2000, 20_000]) + text[at:]


def _structure_changed(root: list[Any], draw: random.Random) -> None:
    """Replace, remove, rename, wrap or swap something, anywhere."""
    places = list(_places(root))
    holder, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind <= 2:
        alike = [each for each in WEIRD if type(each) is type(holder[key])]
        holder[key] = draw.choice(alike if alike and draw.random() < 0.7 else WEIRD)
    elif kind == 3 and isinstance(holder, dict):
        value = holder.pop(key)
        if draw.random() < 0.5:
            holder[draw.choice(["", ESCAPE, "schema", f"{key} ", "\ud800", str(key).upper()])] = value
    elif kind == 4:
        value = holder[key]
        for _ in range(draw.choice([1, 50, 200])):
            value = [value]
        holder[key] = value
    else:
        other, name = draw.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))


def _places(value: Any) -> Any:
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(each, dict | list):
            yield from _places(each)
