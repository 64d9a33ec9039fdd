"""Texts from elsewhere, made safe to show: without what controls a terminal or deceives the eye."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

# C0 except tab and newline, DEL, C1, marks of direction, lone surrogates, the byte order mark.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_SUSPECT = re.compile(
    rb"\\u00[01789]|\\u20[026]|\\u[dD][89a-fA-F]|\\u[fF][eE][fF]{2}|\\[bfr]|\x7f|\xc2[\x80-\x9f]|\xe2\x80[\x8e-\xae]|\xe2\x81[\xa6-\xa9]|\xef\xbb\xbf"
)

_LONG = re.compile(rb"[0-9]{20}")


def plain(text: str, most: int | None = None) -> str:
    """Return the text without control characters, and cut to so many characters if `most` says so."""
    cut = text if most is None or len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
    return _UNSEEN.sub("\ufffd", cut)


def is_suspect(raw: bytes) -> bool:
    """Return whether a text of this JSON could hold such characters. True may be wrong, False never is."""
    return _SUSPECT.search(raw) is not None


def all_plain(value: Any, most: int | None = None) -> Any:
    """Return the value with every text in it, names included, made plain."""
    if isinstance(value, str):
        return plain(value, most)
    if isinstance(value, dict):
        return {all_plain(name, most): all_plain(each, most) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [all_plain(each, most) for each in value]
    return value


def fits(value: Any) -> bool:
    """Return whether every whole number in the value fits 64 bits, as in all that hpc-core writes. Others cannot be divided."""
    if isinstance(value, int):
        return abs(value) < 2**64
    if isinstance(value, dict):
        return all(map(fits, value.values()))
    return not isinstance(value, list | tuple) or all(map(fits, value))


def may_not_fit(raw: bytes) -> bool:
    """Return whether this JSON could hold a whole number that does not fit. True may be wrong, False never is."""
    return _LONG.search(raw) is not None


def plain_json(thing: object, *, indent: int = 0, sort: bool = True) -> bytes:
    """Return JSON of anything that msgspec encodes. A text that UTF-8 cannot hold, such as the name of a file, is made plain."""
    order: Literal["sorted"] | None = "sorted" if sort else None
    try:
        text = msgspec.json.encode(thing, order=order)
    except UnicodeEncodeError:
        text = msgspec.json.encode(all_plain(msgspec.to_builtins(thing)), order=order)
    return msgspec.json.format(text, indent=indent) if indent else text
