"""A report's files: Markdown that is short where nothing moved, CSV of all metrics, and the command that writes them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import msgspec
import pytest

from hpc_core.cli import main
from hpc_core.report.csv import COLUMNS, records_csv
from hpc_core.report.entry import Entry, entries_of
from hpc_core.report.markdown import LARGEST_BYTES, markdown
from hpc_core.report.page import LARGEST_BYTES as LARGEST_PAGE
from hpc_core.report.page import VEGA_BYTES, page
from tests.report.many_records import H100, failed, many, measured, with_metric, written

NEWEST = {record.case.id: record for record in measured()}
QLORA, FULL = "llama-3.2-3b/qlora", "llama-3.2-3b/full-fp32"


def judged(*, worse: float = 1.0, broken: bool = False) -> tuple[Entry, ...]:
    """The H100's cases against their own baselines; one takes `worse` times its memory, one may be broken."""
    records = NEWEST | ({QLORA: with_metric(NEWEST[QLORA], "peak_bytes", worse)} if worse != 1 else {})
    records |= {FULL: failed(NEWEST[FULL], "tried to allocate 20 GiB")} if broken else {}
    return entries_of(records.values(), H100.parent)


def test_markdown_is_short_where_nothing_moved() -> None:
    """Markdown of an unchanged run is one line and one closed fold."""
    visible = [line for line in markdown(judged()).partition("<details>")[0].splitlines() if line]
    assert visible == [f"### hpc-core: {len(NEWEST)} cases, nothing changed ✅"]
    assert "<details open>" not in markdown(judged())


def test_markdown_without_baselines_is_neutral() -> None:
    """Where nothing was judged, no mark says that all is well."""
    text = markdown(entries_of(NEWEST.values()))
    assert text.startswith(f"### hpc-core: {len(NEWEST)} cases, nothing judged ⚪\n")
    assert "✅" not in text


def test_markdown_begins_with_the_cases_that_moved() -> None:
    """Markdown counts the verdicts, lists the moved cases alone, and opens each with value, change and limit."""
    text = markdown(judged(worse=1.33, broken=True))
    head, _, rest = text.partition("<details open>")
    assert head.splitlines()[0] == f"### hpc-core: 🔴 1 BROKEN, 🔴 1 REGRESSED of {len(NEWEST)} cases"
    assert [line.split(" | ")[0] for line in head.splitlines()[6:8]] == [f"| {FULL}", f"| {QLORA}"]
    assert head.splitlines()[2].startswith("judged: busy, peak memory, ")
    assert "out\\_of\\_memory in build: tried to allocate 20 GiB" in rest
    assert "| peak\\_bytes | 13.36 GiB | 17.77 GiB | \\+33 % | \\+0.05 % | REGRESSED |" in rest
    assert f"{len(NEWEST) - 2} cases unmoved" in rest
    assert text.count("<details") == text.count("</details>") == 3


def test_markdown_stays_below_githubs_limit() -> None:
    """Markdown of a thousand broken cases with long messages is cut below GitHub's limit and says so."""
    records = [failed(record, "<" * 4000) for record in many(1000)]
    text = markdown(entries_of(records))
    assert len(text.encode()) < LARGEST_BYTES + 1000
    assert "Cut here" in text


def test_the_csv_holds_every_metric_of_every_session() -> None:
    """The CSV holds every value unchanged, and the newest session next to the accepted one."""
    entries = entries_of(measured(), H100.parent)
    rows = list(csv.DictReader(io.StringIO(records_csv(entries))))
    assert len(rows) == sum(len(record.metrics) for entry in entries for record in entry.past)
    values = {(row["case"], row["started_at"], row["metric"]): float(row["value"]) for row in rows}
    for record in measured():
        for name, metric in record.metrics.items():
            assert values[record.case.id, record.circumstances.started_at, name] == metric.value
    judged_rows = [row for row in rows if row["metric_verdict"]]
    assert judged_rows
    assert all(float(row["accepted"]) == float(row["value"]) for row in judged_rows if row["noise"] == "exact")


def test_a_case_without_numbers_has_a_row() -> None:
    """A failed case has one CSV row with its reason."""
    (row,) = csv.DictReader(io.StringIO(records_csv(entries_of([failed(NEWEST[FULL], "tried to allocate 20 GiB")]))))
    assert (row["verdict"], row["note"], row["value"]) == ("BROKEN", "tried to allocate 20 GiB", "")
    assert tuple(row) == COLUMNS


def test_a_page_of_many_cases_drops_details_before_rows() -> None:
    """A page of 1,100 cases keeps 1,000 rows within 2 MB besides Vega, and says what it leaves out."""
    text = page(entries_of(many(1100)))
    assert len(text.encode()) < LARGEST_PAGE + VEGA_BYTES
    assert text.count("<tr data-m=") == 1000
    assert "100 more cases are not on this page" in text
    assert "are left out to keep the page small" in text


def test_the_command_writes_each_requested_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command writes page, Markdown and CSV, appends the Markdown to a GitHub job's summary, and prints no colour in a pipe."""
    records = written(tmp_path / "records", [NEWEST[QLORA], failed(NEWEST[FULL], "tried to allocate 20 GiB")])
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    out = {name: tmp_path / "out" / name for name in ("r.html", "r.md", "r.csv")}
    command = ["report", str(records), "--baselines", str(H100.parent)]
    for option, path in zip(("--html", "--markdown", "--csv"), out.values(), strict=True):
        command += [option, str(path)]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 0
    assert out["r.html"].read_text().startswith("<!doctype html>")
    assert out["r.md"].read_text() == summary.read_text().removeprefix("before\n")[:-1]
    assert out["r.csv"].read_text().splitlines()[0] == ",".join(COLUMNS)
    captured = capsys.readouterr()
    assert "BROKEN" in captured.out
    assert "\x1b" not in captured.out
    assert all(f"wrote {path}" in captured.err for path in out.values())


def test_the_command_selects_cases_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--case takes globs over whole ids; a glob that matches nothing is refused, and nothing is written."""
    with pytest.raises(SystemExit):
        main(["report", str(H100), "--case", "*/lora", "--case", "*/qlora", "--json"])
    document = msgspec.json.decode(capsys.readouterr().out)
    assert [each["case"] for each in document["cases"]] == ["llama-3.2-3b/lora", QLORA]
    assert document["cases"][1]["metrics"]["peak_bytes"]["value"] == NEWEST[QLORA].metrics["peak_bytes"].value
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(H100), "--case", "lora", "--csv", str(tmp_path / "r.csv")])
    assert stopped.value.code == 2
    assert "is of a case that matches lora" in capsys.readouterr().err
    assert not (tmp_path / "r.csv").exists()
