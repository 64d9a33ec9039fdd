"""The table at the end of a run keeps every row, is no wider than the terminal, and has no colour in a pipe."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rich.cells import cell_len

from hpc_core.baselines.accept import accept
from hpc_core.baselines.baseline import Lookup, Missing
from hpc_core.case.limits import GiB
from hpc_core.catalogue import catalogue
from hpc_core.gate.judge import judge
from hpc_core.record.metrics import WAITED
from hpc_core.record.record import Failure, Metric, Record
from hpc_core.report.entry import Row
from hpc_core.report.lines import accepted_line
from hpc_core.report.terminal import render
from tests.strategies import a_case, a_record, busy, counted, peak, stored_baseline, wall

LORA = catalogue()["llama-3.2-3b/lora"]


def reported(value: float, unit: str) -> Metric:
    return Metric(value=value, unit=unit, noise="wall", better="higher", depends_on=("case",), gated=False)


def measured(variant: str = "qlora-prepare-nogc", **changes: Metric) -> Record:
    """A record of an H100 with everything that the table can show."""
    metrics = {
        "peak_bytes": peak(13.35 * GiB),
        "busy_s": busy(0.2517),
        "kernels": counted(16170),
        "step_s": wall(0.2631, gated=True),
        "tokens_per_s": reported(7784.2, "tokens/s"),
        "mfu": reported(0.414, "ratio"),
    }
    case = catalogue().get(f"llama-3.2-3b/{variant}") or msgspec.structs.replace(LORA, id=f"llama-3.2-3b/{variant}")
    return a_record(metrics | changes, case=case)


def row(record: Record, lookup: Lookup | None = None) -> Row:
    # The device sets the pace, so wall time needs no accepted canary.
    judgement = judge(record, lookup or Missing(path="baselines/x.json"), sessions={"busy_share": ((0.95,),)})
    return Row(record=record, judgement=judgement)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """A passing, a regressed and a broken case, and one without a baseline."""
    good, worse = measured("lora"), measured(peak_bytes=peak(15.23 * GiB))
    accept(tmp_path, good, reason="first")
    accept(tmp_path, measured(), reason="first")
    failure = Failure(kind="out_of_memory", message="CUDA out of memory. Tried to allocate 20 GiB.", phase="build")
    broken = msgspec.structs.replace(measured("full-fp32"), status="failed", failure=failure, metrics={})
    return [
        row(good, stored_baseline(tmp_path, good)),
        row(worse, stored_baseline(tmp_path, worse)),
        row(broken),
        row(measured("lora-gc")),
    ]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_nothing_is_wider_than_the_terminal(rows: list[Row], width: int) -> None:
    """Every line fits except commands to copy, and each case has its row with its verdict."""
    lines = render(rows, width=width, color=False).splitlines()
    assert [line for line in lines if cell_len(line) > width and "pytest --benchmark" not in line] == []
    table = lines[: lines.index("")]
    verdicts = {"lora": "PASS", "qlora-prepare-nogc": "REGRESSED", "full-fp32": "BROKEN", "lora-gc": "NO_BASELINE"}
    for variant, verdict in verdicts.items():
        [line] = [line for line in table if f" {verdict}" in line]
        assert line.split()[0] in (variant, f"llama-3.2-3b/{variant}")


def test_a_very_narrow_terminal_cuts_names_only(rows: list[Row]) -> None:
    """At 50 columns each row keeps its whole verdict; only names are cut."""
    lines = render(rows, width=50, color=False).splitlines()
    table = lines[: lines.index("")]
    assert max(map(cell_len, table)) <= 50
    for verdict in ("PASS", "REGRESSED", "BROKEN", "NO_BASELINE"):
        assert [line for line in table if f" {verdict} " in line or line.endswith(f" {verdict}")]


def test_a_quantized_case_shows_the_unquantized_perplexity_too() -> None:
    """A quantized case shows both perplexities, another its own, and a table without perplexity has no such column."""
    both = {"perplexity": reported(38.7355, "1"), "perplexity_unquantized": reported(30.3675, "1")}
    quantized = Row(record=measured("generate-nf4", **both))
    plain = Row(record=measured("generate-fp16", perplexity=reported(30.3675, "1")))
    assert (quantized.perplexity, plain.perplexity) == ("38.74 (30.37)", "30.37")
    for width in (80, 140):
        table = render([quantized, plain], width=width, color=False).splitlines()
        assert "ppl (unquantized)" in table[0]
        assert any("38.74 (30.37)" in line for line in table)
    assert "ppl" not in render([Row(record=measured())], width=140, color=False)


@pytest.mark.parametrize(
    ("width", "cells"),
    [
        (140, ("263.10 ms", "251.70 ms", "15.23 GiB", "7,784", "MFU 41 %", "peak_bytes +14.08 %")),
        (80, ("263.10 ms", "15.23 GiB", "peak_bytes +14.08 %")),
    ],
)
def test_a_narrower_terminal_drops_the_least_needed_columns(
    rows: list[Row], width: int, cells: tuple[str, ...]
) -> None:
    """At 140 columns every column is shown; at 80, time, memory and the change stay."""
    line = next(line for line in render(rows, width=width, color=False).splitlines() if "REGRESSED" in line)
    for cell in cells:
        assert cell in line


def test_the_header_says_what_is_judged(tmp_path: Path) -> None:
    """A line above the table lists it; a number that is not judged in a case of which others are has a mark."""
    accept(tmp_path, measured("lora"), reason="first")
    quiet, busy_host = measured("lora"), measured("lora", step_s=wall(0.9, note=f"9 of 10 {WAITED}"))
    for record, line, cell in (
        (quiet, "judged: wall, busy, peak memory, 1 other metric", "263.10 ms "),
        (busy_host, "judged: busy, peak memory, 1 other metric; * not judged", "900.00 ms* "),
    ):
        text = render([row(record, stored_baseline(tmp_path, record))], width=140, color=False).splitlines()
        assert text[0] == line
        assert cell in text[2]
    assert "llama-3.2-3b/lora: step_s is 900.00 ms, not judged: 9 of 10 waited for a core." in "\n".join(text)
    assert "judged" not in render([Row(record=quiet)], width=140, color=False)


def test_a_narrow_terminal_keeps_the_wall_time() -> None:
    """Of two numbers of a step of one's own, the time is no less needed than memory: a long name is cut before."""
    own = a_record(
        {"peak_bytes": peak(GiB), "step_s": wall(0.5, gated=True)},
        case=a_case("test_train/test_the_step_of_our_own_trainer"),
    )
    line = next(line for line in render([row(own)], width=72, color=False).splitlines() if "NO_BASELINE" in line)
    assert "500.00 ms" in line
    assert "1.00 GiB" in line


@pytest.mark.parametrize("width", [72, 76, 80, 84, 90, 100])
def test_a_long_change_never_cuts_a_verdict(tmp_path: Path, width: int) -> None:
    """A case with a short name and a long change keeps its whole name, verdict and peak memory."""
    before = a_record(
        {"peak_optimizer_bytes": peak(1.43 * GiB), "peak_bytes": peak(5.69 * GiB), "tokens_per_s": wall(1151)}
    )
    after = a_record(before.metrics | {"peak_optimizer_bytes": peak(1.68 * GiB)})
    accept(tmp_path, before, reason="first")
    table = render([row(after, stored_baseline(tmp_path, before))], width=width, color=False).splitlines()
    line = next(line for line in table if line.startswith("tiny/lora "))
    assert "REGRESSED" in line
    assert "5.69 GiB" in line


def test_a_pipe_gets_no_colours(rows: list[Row]) -> None:
    """Without colour the table has no escape sequences."""
    assert "\x1b" not in render(rows, width=100, color=False)
    assert "\x1b[1;31mREGRESSED" in render(rows, width=100, color=True)


def test_equal_problems_share_one_paragraph() -> None:
    """Ten cases without a baseline are ten rows and one paragraph."""
    text = render([row(measured(f"lora-{n}")) for n in range(10)], width=100, color=False)
    assert text.count("no baseline of") == 1
    assert "NO_BASELINE 10 cases: no baseline of …" in text


def test_markup_in_a_message_is_text() -> None:
    """Square brackets in an error are not styles."""
    failure = Failure(kind="error", message="[bold]x[/nope] in [red]", phase="build")
    broken = msgspec.structs.replace(measured(), status="failed", failure=failure, metrics={})
    assert "[bold]x[/nope] in [red]" in render([row(broken)], width=100, color=True)


def test_an_acceptance_lists_each_change(tmp_path: Path) -> None:
    """An acceptance names the file and each change from the old number to the new."""
    assert "4 metrics, peak_bytes 13.35 GiB" in accepted_line(accept(tmp_path, measured(), reason="first"))
    line = accepted_line(accept(tmp_path, measured(peak_bytes=peak(14 * GiB)), reason="more"))
    assert line.startswith("updated ")
    assert line.endswith("qlora-prepare-nogc.json: peak_bytes 13.35 GiB → 14.00 GiB")
    assert "unchanged" in accepted_line(accept(tmp_path, measured(peak_bytes=peak(14 * GiB)), reason="more"))
