"""The scripts of `bench/` refuse a mistake in one sentence with exit code 2, before anything is measured."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from bench.studies import refusals
from bench.studies.ablations import decode as decode_ablation
from bench.studies.ablations import train as train_ablation
from bench.studies.data_path import epoch
from bench.studies.data_path import feeds as data_path

TINY = ["--shape", "tiny", "--device", "cpu"]
ABLATIONS = (train_ablation, decode_ablation)
SCRIPTS = (epoch, data_path, *ABLATIONS)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (epoch, ["--only", "nonsense"], "no row is called nonsense; there are tuned-fed"),
        (epoch, ["--shape", "nonsense", "--device", "cpu"], "Unknown shape 'nonsense'"),
        (epoch, [*TINY, "--workers", "99"], "workers must be 0 to 64, got 99"),
        (data_path, [*TINY, "--only", "nonsense"], "no feed's name holds 'nonsense'; there are data-w0,"),
        *((script, ["--only", "stock,nonsense"], "no row is called nonsense; there are stock") for script in ABLATIONS),
        *((script, ["--shape", "nonsense"], "Unknown shape 'nonsense'") for script in ABLATIONS),
        *((script, ["--batch", "0"], "batch must be at least 1") for script in ABLATIONS),
        (train_ablation, ["--methods", "nonsense"], "--methods 'nonsense': there are "),
        (decode_ablation, ["--weights", "nonsense"], "--weights 'nonsense': there are "),
        *((script, [*TINY, "--out", "no/such/x.json"], "--out no/such/x.json: there is no such folder") for script in SCRIPTS),
        *((script, [], "no GPU is visible: use --device cpu with --shape tiny") for script in SCRIPTS),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_before_anything_runs(
    script: Any, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message repeats the wrong value and lists the valid ones; without a GPU it names the options for a CPU."""
    monkeypatch.setattr(refusals, "visible_gpus", tuple)
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
