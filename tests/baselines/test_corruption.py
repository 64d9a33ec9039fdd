"""A corrupt baseline file never passes and never raises."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpc_core.baselines.accept import accept
from hpc_core.baselines.lookup import baseline_path, find
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Verdict
from tests.strategies import H100, a_record

RECORD = a_record()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline file that passes as it is."""
    root = tmp_path_factory.mktemp("baselines")
    accept(root, RECORD, reason="r")
    path = baseline_path(root, H100.key, RECORD.case.id)
    assert verdict(path) is Verdict.PASS
    return path


@functools.cache
def intact(path: Path) -> bytes:
    return path.read_bytes()


def verdict(path: Path) -> Verdict:
    return judge(RECORD, find(path.parents[2], H100.key, RECORD.case.id)).verdict


def refused(path: Path, content: bytes) -> None:
    before = intact(path)
    path.write_bytes(content)
    try:
        if content != before:
            assert verdict(path) is Verdict.INVALID, content
    finally:
        path.write_bytes(before)


def test_every_truncation_is_refused(file: Path) -> None:
    """A file cut off anywhere is INVALID, down to the missing newline."""
    text = intact(file)
    for length in range(len(text)):
        refused(file, text[:length])


places = st.floats(0, 1, exclude_max=True)


@given(places, st.integers(1, 255))
def test_flipped_bits_are_refused(file: Path, where: float, mask: int) -> None:
    """A byte with any bits flipped is INVALID."""
    text = bytearray(intact(file))
    text[int(where * len(text))] ^= mask
    refused(file, bytes(text))


@given(places, st.binary(min_size=1, max_size=4))
@example(0.99999, b"\n")
@example(0.0, b"\xef\xbb\xbf")
def test_inserted_bytes_are_refused(file: Path, where: float, more: bytes) -> None:
    """Additional bytes are INVALID, white space and byte-order marks included."""
    text = intact(file)
    at = int(where * (len(text) + 1))
    refused(file, text[:at] + more + text[at:])


@given(places, st.integers(1, 200))
def test_deleted_bytes_are_refused(file: Path, where: float, count: int) -> None:
    """Missing bytes are INVALID."""
    text = intact(file)
    at = int(where * len(text))
    refused(file, text[:at] + text[at + count :])


@given(places, places)
def test_swapped_lines_are_refused(file: Path, one: float, other: float) -> None:
    """Swapped lines, as a merge may leave them, are INVALID."""
    lines = intact(file).splitlines(keepends=True)
    i, j = int(one * len(lines)), int(other * len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    refused(file, b"".join(lines))


@given(places, st.sampled_from(b"0123456789"))
def test_edited_digits_are_refused(file: Path, where: float, digit: int) -> None:
    """A digit changed by hand, the most tempting edit, is INVALID."""
    text = bytearray(intact(file))
    digits = [at for at, byte in enumerate(text) if byte in b"0123456789"]
    text[digits[int(where * len(digits))]] = digit
    refused(file, bytes(text))
