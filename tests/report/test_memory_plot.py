"""Memory over a step as a picture: each file type, a second record over it, and refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from hpc_core.case.errors import MissingLibraryError, SpecError
from hpc_core.record.record import MemoryTimeline, Record, record_from_json, record_to_json
from hpc_core.report.pictures import check_picture, write_memory
from tests.strategies import a_record, around

MIB = 2**20
drawn = pytest.mark.skipif(importlib.util.find_spec("vl_convert") is None, reason="charts are optional")


def recorded(**changes: Any) -> Record:
    """A record of a step whose memory rises and falls."""
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
def test_the_suffix_chooses_the_file_type(suffix: str, begins: bytes, tmp_path: Path) -> None:
    """The suffix chooses SVG, PNG or PDF."""
    write_memory(recorded(), tmp_path / f"memory{suffix}")
    assert (tmp_path / f"memory{suffix}").read_bytes().startswith(begins)


@drawn
@pytest.mark.slow
def test_a_picture_is_labelled_and_reproducible(tmp_path: Path) -> None:
    """A picture names case, GPU, stack, phases, categories, peak and the other record's total; the same record gives the same file."""
    path = tmp_path / "memory.svg"
    write_memory(recorded(), path, over=a_record(timeline=recorded(events=(0, 1, 5, 8, 11)).timeline))
    text = path.read_text()
    for word in ("tiny/lora", "H100", "torch 2.11", "forward", "backward", "weights", "MiB", "peak 9.00 MiB"):
        assert word in text
    assert "measured, total" in text
    write_memory(recorded(), path, over=a_record(timeline=recorded(events=(0, 1, 5, 8, 11)).timeline))
    assert path.read_text() == text


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown suffix, a missing folder, a record without timeline, other phases and a missing library are refused with the next step."""
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


def test_a_timeline_equals_its_json() -> None:
    """A record's timeline equals its JSON, is absent where there is none, and needs columns of one length."""
    record = recorded()
    assert record_from_json(record_to_json(record)) == record
    assert b"timeline" not in record_to_json(a_record())
    with pytest.raises(SpecError, match="one phase and one value"):
        recorded(events=(0, 1))
