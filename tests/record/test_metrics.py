"""The registry of metrics agrees with every committed record, and with the limits that a case can set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_core.case.errors import SpecError
from hpc_core.case.limits import Limits
from hpc_core.record.metrics import METRICS, definition_of, metric
from hpc_core.record.record import Metric

_BASELINES = Path(__file__).parents[2] / "baselines"


def _committed() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every stored record: the accepted metrics of each baseline, and all metrics of each record in the histories."""
    for path in sorted(_BASELINES.rglob("*.json")):
        yield str(path), json.loads(path.read_bytes())
    for path in sorted(_BASELINES.rglob("*.history.jsonl")):
        for line in path.read_text().splitlines():
            yield str(path), json.loads(line)


def _same_by_registry(name: str, stored: dict[str, Any], *, on_gpu: bool, captured_training: bool) -> Metric:
    return metric(
        name,
        stored["value"],
        samples=stored.get("samples"),
        on_gpu=on_gpu,
        per=stored["unit"].partition(" per ")[2] or None,
        note=stored.get("note"),
        gated=False if captured_training and name == "graph_pool_bytes" else None,
    )


def test_every_committed_metric_is_what_the_registry_makes() -> None:
    """Unit, noise class, direction, dependences and gating of each stored metric follow from its name and where it ran."""
    checked = set()
    for path, content in _committed():
        on_gpu = not path.startswith(str(_BASELINES / "cpu"))
        captured_training = "tuned" in path
        for name, stored in content.get("metrics", {}).items():
            made = _same_by_registry(name, stored, on_gpu=on_gpu, captured_training=captured_training)
            kept = {"gated": True, "note": None, "samples": None} | stored
            seen = {field: getattr(made, field) for field in made.__struct_fields__}
            if seen["samples"] is not None:
                seen["samples"] = list(seen["samples"])
            assert kept | {"depends_on": tuple(kept["depends_on"])} == seen, f"{path}: {name}"
            checked.add(name)
    assert len(checked) > 60


def test_every_limit_is_of_a_gated_metric() -> None:
    """A field of Limits that no gated metric has would be a limit that nothing keeps."""
    definitions = {name: definition_of(name) for name in Limits.__struct_fields__}
    assert {name for name, each in definitions.items() if each is None} == set()
    assert {name for name, each in definitions.items() if each is not None and each.limit != name} == set()
    # `peak_load_bytes` can be limited and is only shown: such a limit is INCOMPATIBLE, with the reason.
    assert {name for name, each in definitions.items() if each is not None and not each.gated} == {"peak_load_bytes"}


def test_every_definition_is_a_sentence_and_says_how_a_gated_metric_is_explained() -> None:
    """The documents print the sentence; a red case without an explanation would be a riddle."""
    for definition in METRICS.values():
        assert definition.doc.endswith(".")
        assert definition.explained is not None or not definition.gated, definition.name


def test_a_family_gives_each_member_its_own_name() -> None:
    """`peak_<phase>_bytes` is a pattern: it is no metric itself."""
    own = definition_of("peak_rollout_bytes")
    assert own is not None
    assert (own.name, own.limit) == ("peak_rollout_bytes", None)
    assert definition_of("peak_<phase>_bytes") is None


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    """A typing error must not become a new metric."""
    with pytest.raises(SpecError, match=r"no metric 'peak_byts'\. Did you mean peak_bytes"):
        metric("peak_byts", 1)
    with pytest.raises(SpecError, match="needs a value or samples"):
        metric("step_s")


def test_samples_give_the_median() -> None:
    """A value that is not given is the median of the samples."""
    assert metric("step_s", samples=[3.0, 1.0, 2.0]).value == 2.0


def test_a_workload_may_differ_from_the_definition() -> None:
    """Padding is the case's in the suite, and the user's choice in a Trainer."""
    assert metric("padded_tokens", 5).better == "same"
    assert metric("padded_tokens", 5, better="lower").better == "lower"
    assert metric("graph_pool_bytes", 5, on_gpu=True, gated=False).gated is False
