"""The record of a graph-engine case says what ran and compares its logits; a wrong engine is INVALID."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_core.case.parts import AdapterSpec, QuantSpec
from hpc_core.catalogue import generate, tiny
from hpc_core.engines.decode import plain_step
from hpc_core.record.record import Record
from tests.tiny_cases import measured

CASE = generate(tiny, variant="graph", prompts=1, prompt_length=12, new_tokens=8, engine="graph", cache_step=64)


def _facts(record: Record) -> dict[str, Any]:
    assert record.status == "ok", record.reasons
    return {name: fact.seen for name, fact in record.audit.items()}


def test_a_record_says_what_ran_and_how_it_compares() -> None:
    """On a CPU nothing is captured, a note says why, and logits agree with the reference and the stock path."""
    record, _ = measured(CASE)
    facts = _facts(record)
    expected = {"engine": "graph", "captured": False, "kernels": "torch"}
    expected |= {"head": "plain", "steps": 4, "cache_length": 16}
    assert {name: facts[name] for name in expected} == expected
    assert any("no CUDA" in note for note in record.circumstances.notes)
    assert record.metrics["kv_cache_bytes"].value == 2 * 3 * 2 * 19 * 32 * 2  # layers, groups, places, width, bytes
    assert record.metrics["unexplained_bytes"].value == 0
    assert 0 < record.metrics["logits_error"].value < 1e-2
    assert record.metrics["logits_error_to_stock"].value < 1e-2
    assert record.metrics["stock_agreement"].value == 1


def test_an_adapter_is_merged_into_four_bit_weights() -> None:
    """An adapter is merged before the run, and the weights are quantized again."""
    case = CASE.vary(
        "merged", adapter=AdapterSpec(), quantization=QuantSpec(kind="nf4", compute_dtype="bfloat16"), head="int8"
    )
    facts = _facts(measured(case)[0])
    assert (facts["adapter"], facts["head"], facts["quantization"]) == ("merged", "int8", ["nf4"])


def test_a_wrong_engine_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that leaves out the MLP fails the comparison with the reference."""
    monkeypatch.setattr(plain_step, "_mlp", lambda layer, hidden: torch.zeros_like(hidden))
    record, _ = measured(CASE)
    assert record.status == "invalid"
    assert any(reason.startswith("equivalence: asked for 'within 0.05") for reason in record.reasons), record.reasons
