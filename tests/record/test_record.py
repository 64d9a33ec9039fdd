"""Records equal their JSON, and refuse bad numbers and contradictions."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given

from hpc_core.case.errors import SpecError
from hpc_core.record.plain import all_plain
from hpc_core.record.record import Fact, Metric, Record, record_from_json, record_to_json
from tests.strategies import a_record, counted, failed_record, records, wall


@given(records())
def test_round_trip(record: Record) -> None:
    """A record whose texts are plain equals its JSON, compact or indented, and its case keeps its digest."""
    again = record_from_json(record_to_json(record))
    content = {name: each if name == "case" else all_plain(each) for name, each in msgspec.to_builtins(record).items()}
    assert again == msgspec.convert(content, Record)
    assert again.case.digest == record.case.digest
    assert record_from_json(record_to_json(record, indent=2)) == again
    assert record_from_json(record_to_json(again)) == again


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2**64, -(2**64), 10**400])
def test_a_metric_needs_a_finite_number(value: float) -> None:
    """A value or sample must be finite and fit 64 bits."""
    with pytest.raises(SpecError, match="must be finite and fit 64 bits"):
        counted(value)
    with pytest.raises(SpecError, match="must be finite and fit 64 bits"):
        counted(1, samples=(1.0, value))


def test_samples_are_not_empty() -> None:
    """A metric's samples cannot be empty."""
    with pytest.raises(SpecError, match="needs at least one"):
        counted(1, samples=())


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"status": "failed"}, "has a failure exactly if"),
        ({"failure": failed_record().failure}, "has a failure exactly if"),
        ({"status": "invalid"}, "has reasons exactly if"),
        ({"reasons": ("too fast",)}, "has reasons exactly if"),
    ],
)
def test_status_and_content_agree(changes: dict[str, Any], fragment: str) -> None:
    """A failed record has a failure, an invalid one has reasons, and no other record has either."""
    with pytest.raises(SpecError, match=fragment):
        a_record(**changes)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"case":{}}',
        record_to_json(a_record())[:-1],
        record_to_json(a_record({"operators": counted(7)})).replace(b":7", b":1" + b"0" * 400),
    ],
)
def test_refused_json(text: bytes) -> None:
    """Bad JSON raises SpecError and nothing else."""
    with pytest.raises(SpecError, match="Not a record"):
        record_from_json(text)


def test_other_schema() -> None:
    """A record of another schema is refused by its number."""
    text = record_to_json(a_record())[:-1] + b',"schema":99}'
    with pytest.raises(SpecError, match="schema 99, this hpc-core reads 1"):
        record_from_json(text)


def test_nested_refusal_has_its_path() -> None:
    """A contradiction deep in the JSON is reported with its path."""
    text = record_to_json(a_record()).replace(b'"scale":"tiny"', b'"scale":"tiny","timeout_s":-1.0')
    with pytest.raises(SpecError, match=r"timeout_s must be above 0.*at `\$\.case`"):
        record_from_json(text)


def test_facts_and_wall_samples() -> None:
    """A fact holds if both sides are equal; wall samples fall back to the value, or are empty."""
    assert Fact(asked=4, seen=4).holds
    assert not Fact(asked=4, seen=5).holds
    assert a_record({"step_s": wall(0.5)}).wall_samples == (0.5,)
    assert a_record({"query_s": msgspec.structs.replace(wall(), samples=(1.0, 2.0))}).wall_samples == (1.0, 2.0)
    assert a_record({"operators": counted()}).wall_samples == ()


def test_metric_is_frozen() -> None:
    """A metric cannot be changed."""
    metric: Metric = counted()
    with pytest.raises(AttributeError):
        metric.value = 3  # type: ignore[misc]
