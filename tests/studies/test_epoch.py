"""The epoch of `bench/studies/data_path/epoch.py` on a tiny model is run whole, or extrapolated and marked so."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from bench.studies.data_path import epoch
from hpc_core.case.lengths import recorded_lengths

OPTIONS = argparse.Namespace(
    shape="tiny", device="cpu", rows=60, batch=2, length=32, workers=1, ahead=1, stock_steps=3, limit_s=120.0
)


def test_an_epoch_trains_on_every_full_block() -> None:
    """An epoch trains on every block of two rows of 32 tokens; the remaining tokens fill no batch."""
    epoch_result: dict[str, Any] = epoch.measure(epoch.case_of("tuned-fed", OPTIONS), "cpu")
    available_tokens = sum(recorded_lengths("wikitext2")[:60])
    assert 0 <= available_tokens - epoch_result["tokens"] < 2 * 32
    assert epoch_result["steps"] == epoch_result["epoch_steps"] == available_tokens // 64
    assert len(epoch_result["losses"]) == epoch_result["steps"]
    text = epoch.line("tuned-fed", epoch_result, OPTIONS)
    assert f"all {epoch_result['steps']} steps run of 2 x 32" in text
    assert "graph off: a CUDA graph needs a GPU" in text
    assert epoch_result["fetched"] == epoch_result["steps"] + OPTIONS.ahead  # none of a round before it
    assert (epoch_result["epoch_s"], epoch_result["extrapolated"]) == (epoch_result["seconds"], False)


def test_a_stock_epoch_is_extrapolated_and_says_so() -> None:
    """Three padded steps stand for thirty, with the rows without a next token among them."""
    epoch_result: dict[str, Any] = epoch.measure(epoch.case_of("stock-padded", OPTIONS), "cpu")
    assert epoch_result["epoch_steps"] + epoch_result["skipped"] == 30
    assert "extrapolated from 3 steps to 30 of 2 x 32" in epoch.line("stock-padded", epoch_result, OPTIONS)
    assert epoch_result["epoch_s"] == pytest.approx(10 * epoch_result["seconds"])
    assert epoch_result["padded"] > 0
