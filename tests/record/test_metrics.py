"""The registry of metrics agrees with every committed record and with the limits that a case can set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpc_core.case.errors import SpecError
from hpc_core.case.limits import Limits
from hpc_core.record.metrics import METRICS, definition_of, metric
from hpc_core.record.record import Metric

_BASELINES = Path(__file__).parents[2] / "baselines"


def _stored_records() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every baseline, and every record in the histories."""
    for path in sorted(_BASELINES.rglob("*.json")):
        yield str(path), json.loads(path.read_bytes())
    for path in sorted(_BASELINES.rglob("*.history.jsonl")):
        for line in path.read_text().splitlines():
            yield str(path), json.loads(line)


def test_every_committed_metric_is_what_the_registry_makes() -> None:
    """Unit, noise class, direction, dependences and gating of a stored metric follow from its name and where it ran."""
    checked = set()
    for path, content in _stored_records():
        for name, stored in content.get("metrics", {}).items():
            # In records of before energy, wall time and a GPU's waits were judged.
            shown = stored["noise"] == "wall" and not stored.get("gated", True)
            shown |= name == "waits" and not stored.get("gated", True)
            shown |= "tuned" in path and name == "graph_pool_bytes"
            made = metric(
                name,
                stored["value"],
                samples=stored.get("samples"),
                on_gpu=not path.startswith(str(_BASELINES / "cpu")),
                per=stored["unit"].partition(" per ")[2] or None,
                note=stored.get("note"),
                gated=stored.get("gated", True) if shown else None,
            )
            assert made == msgspec.convert(stored, Metric), f"{path}: {name}"
            checked.add(name)
    assert len(checked) > 60


def test_every_limit_is_of_a_gated_metric() -> None:
    """Each field of Limits limits one gated metric."""
    definitions = {name: definition_of(name) for name in Limits.__struct_fields__}
    assert {name for name, each in definitions.items() if each is None} == set()
    assert {name for name, each in definitions.items() if each is not None and each.limit != name} == set()
    # `peak_load_bytes` is not gated: a limit on it makes the metric INCOMPATIBLE.
    assert {name for name, each in definitions.items() if each is not None and not each.gated} == {"peak_load_bytes"}


def test_every_metric_is_documented_and_every_gated_one_explained() -> None:
    """Each metric's documentation is a sentence, and each gated metric says how it is explained."""
    for definition in METRICS.values():
        assert definition.doc.endswith(".")
        assert definition.explained is not None or not definition.gated, definition.name


def test_a_family_gives_each_member_its_own_name() -> None:
    """`peak_<phase>_bytes` defines a family of metrics and is none itself."""
    own = definition_of("peak_rollout_bytes")
    assert own is not None
    assert (own.name, own.limit) == ("peak_rollout_bytes", None)
    assert definition_of("peak_<phase>_bytes") is None


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    """A mistyped name is refused, with the nearest one."""
    with pytest.raises(SpecError, match=r"no metric 'peak_byts'\. Did you mean peak_bytes"):
        metric("peak_byts", 1)
    with pytest.raises(SpecError, match="needs a value or samples"):
        metric("step_s")


def test_samples_give_the_median() -> None:
    """Without a value, a metric's value is the median of its samples."""
    assert metric("step_s", samples=[3.0, 1.0, 2.0]).value == 2.0


def test_a_workload_may_differ_from_the_definition() -> None:
    """A caller can override a metric's direction and gating."""
    assert metric("padded_tokens", 5).better == "same"
    assert metric("padded_tokens", 5, better="lower").better == "lower"
    assert metric("graph_pool_bytes", 5, on_gpu=True, gated=False).gated is False
