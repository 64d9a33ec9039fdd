"""The ablations from stock to tuned: rows in the order of their steps, reasons in place of numbers, and the scripts that write them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.studies.ablations import decode as decode_ablation
from bench.studies.ablations import train as train_ablation
from bench.studies.ablations.chart import drawn_steps, main
from bench.studies.ablations.ladder import ladders_of
from bench.studies.stock_and_tuned.paired import work_of
from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from tests.commands import exit_code

pytest.importorskip("vl_convert")
METHODS, WEIGHTS = ["lora", "qlora", "full"], ["bf16", "nf4"]


def _file(**rows: Any) -> bytes:
    steps = {"title": "QLoRA of a model", "per": "step", "rows": {"a": "stock", "b": "+ one thing", "c": "+ another"}}
    return json.dumps({"source": "a card, a stack", "steps": {"qlora": steps}, "rows": rows}).encode()


_ROWS: dict[str, Any] = {
    "b": {"wall_ms": 60.0, "busy_ms": 58.25, "peak_gib": 5.99, "losses": [1.0]},
    "a": {"wall_ms": 225.0, "busy_ms": 91.0, "peak_gib": 10.39, "tokens_per_s": 39.0},
}


def test_rows_are_in_the_order_of_the_steps() -> None:
    """Stock comes first whatever the file's order; a row that broke or never ran keeps its place and its reason."""
    broken = {"error": "Traceback (most recent call last):\n  …\ntorch.OutOfMemoryError: tried 2 GiB\n"}
    source, [ladder] = ladders_of(_file(**_ROWS, c=broken), "rows.json")
    assert source == "a card, a stack"
    assert [(step.label, step.wall_ms, step.error) for step in ladder.steps] == [
        ("stock", 225.0, ""),
        ("+ one thing", 60.0, ""),
        ("+ another", None, "torch.OutOfMemoryError: tried 2 GiB"),
    ]
    _, [shorter] = ladders_of(_file(**_ROWS), "rows.json")
    assert shorter.steps[-1].error == "not run"


def test_the_picture_shows_every_number_or_its_reason() -> None:
    """The SVG shows labels, numbers with units, the machine and the reason of a missing row; twice the same bytes."""
    source, ladders = ladders_of(_file(**_ROWS), "rows.json")
    drawn = drawn_steps(source, ladders, "svg")
    assert drawn == drawn_steps(source, ladders, "svg")
    texts = {each.text for each in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")}
    assert {
        "QLoRA of a model", "stock", "+ one thing", "225.0, busy 91.0 (39 tokens/s)", "60.0, busy 58.2", "10.39", "5.99",
        "no number: not run", "GiB, a graph's pool included", "a card, a stack",
        "ms per step: wall time; dark: GPU-busy",
    } <= texts  # fmt: skip


@pytest.mark.parametrize(
    ("content", "only", "message"),
    [
        (b"[]", (), "not the file of an ablation"),
        (b'{"source": "x", "rows": {}}', (), "those there: none"),
        (_file(), ("lora",), "of lora; those there: qlora"),
        (_file(stock={"wall_ms": 1e308}), (), r"not the file of an ablation .*<= 1000000000"),
        (_file(stock={"peak_gib": -1.0}), (), "not the file of an ablation .*>= 0"),
    ],
)
def test_another_file_is_refused(content: bytes, only: tuple[str, ...], message: str) -> None:
    """A file that is not an ablation, or lacks the requested steps, is an error that lists what it has."""
    with pytest.raises(SpecError, match=message):
        ladders_of(content, "rows.json", only)


def test_the_command_draws_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file becomes a picture; a wrong suffix, a missing file and a path that cannot be written end with code 2."""
    rows, picture = tmp_path / "rows.json", tmp_path / "steps.png"
    rows.write_bytes(_file(**_ROWS))
    assert main([str(rows), str(picture), "--only", "qlora"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for source, target, message in (
        (rows, tmp_path / "steps.gif", "ends in .svg or .png"),
        (tmp_path / "none.json", picture, "none.json: cannot be read"),
        (rows, rows / "steps.png", "steps.png: cannot be written"),
    ):
        assert exit_code(main, source, target) == 2
        assert message in capsys.readouterr().err


def _ladders() -> list[tuple[str, list[Case]]]:
    trained = train_ablation.cases("llama-3.2-3b", METHODS, 512, 4)
    decoded = decode_ablation.cases("llama-3.2-3b", WEIGHTS, 1)
    groups = train_ablation.steps("llama-3.2-3b", METHODS, 512, 4) | decode_ablation.steps("llama-3.2-3b", WEIGHTS, 1)
    every = trained | decoded
    return [(group, [every[name] for name in each["rows"]]) for group, each in groups.items()]


@pytest.mark.parametrize(("group", "ladder"), _ladders(), ids=[group for group, _ in _ladders()])
def test_each_step_does_the_same_work_another_way(group: str, ladder: list[Case]) -> None:
    """Every row of a ladder starts from a stock case and does the same work with another program."""
    assert getattr(ladder[0].workload, "engine", None) == "stock"
    assert len({work_of(case) for case in ladder}) == 1, group
    assert len({case.digest for case in ladder}) == len(ladder) > 3


def test_each_training_step_only_adds_switches() -> None:
    """No switch that a row turned on is off in the next, but for linears, which blocks contain."""
    for name in METHODS:
        rows = [train_ablation.SWITCHES[row] for row in train_ablation.STEPS if name != "full" or "linears" not in row]
        for before, after in itertools.pairwise(rows):
            common = {key for key in before if key not in ("fusion", "engine")}
            assert {key: after.get(key) for key in common} == {key: before[key] for key in common}


_BREAKING = """
import json, time
from bench.studies.ablations.rows import run_in_child
from bench.studies.ablations.decode import cases

def raises(case, device):
    raise ValueError(f"{case.id} on {device}")

case = next(iter(cases("tiny", ["bf16"], 1).values()))
found = [run_in_child(raises, case, "cpu", 20), run_in_child(lambda *_: time.sleep(60), case, "cpu", 0.2)]
print(json.dumps([*found, run_in_child(lambda *_: {"wall_ms": 1.0}, case, "cpu", 20)]))
"""


def test_a_broken_or_hung_row_does_not_stop_the_next() -> None:
    """A row that raises keeps its traceback, one that hangs is ended, and the next row runs."""
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", _BREAKING], capture_output=True, text=True, timeout=60, cwd=root)
    assert process.returncode == 0, process.stderr
    broken, hung, sound = json.loads(process.stdout)
    assert broken["error"].strip().endswith("ValueError: tiny/row on cpu")
    assert hung == {"error": "took more than 0.2 s"}
    assert sound["wall_ms"] == 1.0
    assert "one process a row" in sound["source"]


def test_a_decode_row_has_the_names_of_every_ablation() -> None:
    """A trial's numbers get the names that every row has, and a void reading of the profiler is noted."""
    trial = {"token_ms": 2.5, "tokens_per_s": 400.0, "first_use_s": {"tune": 3.0, "capture": 1.5}, "warm_up_s": [1.0]}
    assert decode_ablation.row_of(trial, "three readings void") == {
        "wall_ms": 2.5,
        "tokens_per_s": 400.0,
        "first_use_s": 4.5,
        "busy_error": "three readings void",
    }
