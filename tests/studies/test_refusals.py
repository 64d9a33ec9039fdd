"""What the scripts of `bench/` refuse: in a sentence and with exit code 2, before anything is measured."""

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
    ("script", "said", "why"),
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
        *((script, [], "no GPU is visible: say --device cpu, with --shape tiny") for script in SCRIPTS),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_is(
    script: Any, said: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message repeats what was said and lists what there is; without options a GPU is wanted, and what to say where there is none."""
    monkeypatch.setattr(refusals, "visible_gpus", tuple)
    monkeypatch.setattr(sys, "argv", ["bench", *said])
    with pytest.raises(SystemExit) as left:
        script.main()
    assert left.value.code == 2
    assert why in capsys.readouterr().err
