"""Memory over a step as a picture: each kind of file, a second record over it, and what cannot be drawn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from hpc_core.case.errors import MissingLibraryError, SpecError
from hpc_core.record.record import (
    MemoryTimeline,
    Record,
    record_from_json,
    record_to_json,
)
from hpc_core.report.pictures import check_picture, write_memory
from tests.strategies import a_record, around

MIB = 2**20
drawn = pytest.mark.skipif(importlib.util.find_spec("vl_convert") is None, reason="charts are optional")


def recorded(**changes: Any) -> Record:
    """A record of a step that rises and falls."""
    columns: dict[str, tuple[int, ...]] = {
        "weights": (5 * MIB,) * 5,
        "activations": (0, MIB, 3 * MIB, MIB, 0),
        "temporaries": (0, 0, MIB, 0, 0),
    }
    fields: dict[str, Any] = {"phases": ("forward", "backward", "optimizer"), "events": (0, 10, 20, 30, 40)}
    timeline = MemoryTimeline(phase=(-1, 0, 1, 1, 2), bytes_by_category=columns, **(fields | changes))
    return a_record(timeline=timeline, circumstances=around(gpu={"predicted": "H100"}))


@drawn
@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<svg"), (".png", b"\x89PNG"), (".PDF", b"%PDF")])
def test_the_suffix_says_what_is_drawn(suffix: str, begins: bytes, tmp_path: Path) -> None:
    """A vector graphic or pixels."""
    write_memory(recorded(), tmp_path / f"memory{suffix}")
    assert (tmp_path / f"memory{suffix}").read_bytes().startswith(begins)


@drawn
@pytest.mark.slow
def test_a_picture_says_what_it_shows(tmp_path: Path) -> None:
    """Case, GPU, stack, phases, categories with units, the peak, and the other record's total; the same record gives the same file."""
    path = tmp_path / "memory.svg"
    write_memory(recorded(), path, over=a_record(timeline=recorded(events=(0, 1, 5, 8, 11)).timeline))
    text = path.read_text()
    for word in ("tiny/lora", "H100", "torch 2.11", "forward", "backward", "weights", "MiB", "peak 9.00 MiB"):
        assert word in text
    assert "measured, total" in text
    write_memory(recorded(), path, over=a_record(timeline=recorded(events=(0, 1, 5, 8, 11)).timeline))
    assert path.read_text() == text


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suffix, a folder, a record without timeline, other phases, no library: each says what to do."""
    with pytest.raises(SpecError, match=r"\.svg, \.png, \.pdf"):
        check_picture(tmp_path / "memory.txt")
    with pytest.raises(SpecError, match="there is no folder"):
        check_picture(tmp_path / "nowhere" / "memory.svg")
    with pytest.raises(SpecError, match="make it with --timeline"):
        write_memory(a_record(), tmp_path / "memory.svg")
    other = recorded(phases=("prefill", "decode", "rest"))
    with pytest.raises(SpecError, match="has the phases"):
        write_memory(recorded(), tmp_path / "memory.svg", over=other)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(MissingLibraryError, match=r"hpc-core\[report\]"):
        check_picture(tmp_path / "memory.svg")


def test_a_timeline_travels_with_its_record() -> None:
    """It equals its JSON; a record without one says nothing of it; columns of several lengths are refused."""
    record = recorded()
    assert record_from_json(record_to_json(record)) == record
    assert b"timeline" not in record_to_json(a_record())
    with pytest.raises(SpecError, match="one phase and one value"):
        recorded(events=(0, 1))
