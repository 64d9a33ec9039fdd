"""The epoch of `bench/studies/data_path/epoch.py`, on a tiny model: really run through, or extrapolated and said so."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from bench.studies.data_path import epoch
from hpc_core.case.lengths import recorded_lengths

OPTIONS = argparse.Namespace(
    shape="tiny", device="cpu", rows=60, batch=2, length=32, workers=1, ahead=1, stock_steps=3, limit_s=120.0
)


def test_an_epoch_is_every_full_block_of_the_rows() -> None:
    """All blocks of two rows of 32 tokens are trained on, fed; the tokens left out fill no batch; the line says how long it took."""
    found: dict[str, Any] = epoch.measure(epoch.case_of("tuned-fed", OPTIONS), "cpu")
    held = sum(recorded_lengths("wikitext2")[:60])
    assert 0 <= held - found["tokens"] < 2 * 32
    assert found["steps"] == found["epoch_steps"] == held // 64
    assert len(found["losses"]) == found["steps"]
    text = epoch.line("tuned-fed", found, OPTIONS)
    assert f"all {found['steps']} steps run of 2 x 32" in text
    assert "graph off: a CUDA graph needs a GPU" in text
    assert found["fetched"] == found["steps"] + OPTIONS.ahead  # none of a round before it
    assert (found["epoch_s"], found["extrapolated"]) == (found["seconds"], False)


def test_a_stock_epoch_is_extrapolated_and_says_so() -> None:
    """Three padded steps stand for thirty, those of rows without any next token included."""
    found: dict[str, Any] = epoch.measure(epoch.case_of("stock-padded", OPTIONS), "cpu")
    assert found["epoch_steps"] + found["skipped"] == 30
    assert "extrapolated from 3 steps to 30 of 2 x 32" in epoch.line("stock-padded", found, OPTIONS)
    assert found["epoch_s"] == pytest.approx(10 * found["seconds"])
    assert found["padded"] > 0
