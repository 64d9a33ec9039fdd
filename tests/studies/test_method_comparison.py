"""The study of peft's method comparison: its page, and its loop with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.studies.method_comparison.__main__ import ANCHOR, PUBLISHED, REPEATED, Row, evaluated, page

ROOT = Path(__file__).parents[2]


def _row(name: str, published: int, peak: int, trainable: int = 10) -> Row:
    return Row(name, published, {"peak": peak, "reserved": peak, "trainable": trainable})


def test_the_page_scales_by_its_anchor() -> None:
    """The anchor is predicted as published; the others differ by their ratio to it. What failed is named with its reason."""
    gib = 2**30
    rows = [
        _row(ANCHOR, 22 * gib, 20 * gib),
        _row("a/llama-3.2-3B-x", 33 * gib, 27 * gib),
        Row("b", 1, None, "no module"),
    ]
    text = page(rows, [(_row("a/llama-3.2-3B-x", 0, 26 * gib, 8), "without evaluation")])
    assert "| a-x | 33.00 GiB | 29.70 GiB | -10.00 % | -10.00 % |" in text
    assert "| lora-rank32 | 22.00 GiB | 22.00 GiB | +0.00 % | +0.00 % |" in text
    assert "median difference 10.00 %" in text
    assert "- b: no module" in text
    assert "- a/llama-3.2-3B-x without evaluation: 1.00 GiB less, 2 fewer numbers trained" in text


def test_the_published_numbers_have_a_source_and_hold_the_anchor() -> None:
    """Every repeated row and the anchor are among the published ones."""
    published = json.loads(PUBLISHED.read_text())
    assert "huggingface/peft" in published["source"]
    assert {ANCHOR, *REPEATED} <= published["bytes"].keys()


def test_a_growing_cache_reserves_more_than_it_holds() -> None:
    """Two hundred virtual tokens a row make evaluation reserve more than LoRA's whole training did."""
    assert evaluated(0) < 18 * 2**30 < evaluated(200)


@pytest.mark.nightly
def test_disabling_the_adapter_trains_what_lora_fa_froze(tmp_path: Path) -> None:
    """peft's loop evaluates under `disable_adapter()` after the optimizer froze A: A is trained again, and takes memory."""
    folder = tmp_path / "experiments" / "lora" / "fa"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8}')
    given: dict[str, Any] = {
        "dtype": "bfloat16",
        "batch_size": 4,
        "grad_norm_clip": 1.0,
        "optimizer_type": "lora-fa",
        "optimizer_kwargs": {"lr": 1e-4, "r": 8, "lora_alpha": 8, "weight_decay": 0.1},
        "autocast_adapter_dtype": True,
    }
    (tmp_path / "default_training_params.json").write_text(json.dumps(given))
    after, kept = (_loop(folder, *options) for options in ((), ("adapter-on",)))
    assert after["trainable"] > kept["trainable"] > 0
    assert after["held"] > kept["held"]


def _loop(folder: Path, *options: str) -> Any:
    command = [sys.executable, "-m", "bench.studies.method_comparison.loop", str(folder), "64", "shape=tiny", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
