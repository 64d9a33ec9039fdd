"""The table of architectures: its page follows from the stored rows, and a row is what a run and predictions give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.studies.architectures.__main__ import main
from bench.studies.architectures.table import PAGE, Row, Work, config_cases, page, read_rows
from hpc_core.case.errors import SpecError
from hpc_core.case.shapes import MODELS, shrunk
from hpc_core.catalogue.architectures import ARCHITECTURES

_DECODES_BY_COPIES = 0.1
"""A tiny mixture's answer may take this share more on a GPU, where transformers copies the chosen experts' weights."""


def test_the_page_follows_from_the_stored_rows() -> None:
    """Nobody edits the table by hand."""
    assert PAGE.read_text(encoding="utf-8") == page(read_rows())


def test_at_least_25_architectures_run_as_they_are_predicted() -> None:
    """Every stored row is one of the table's, and its tiny steps are predicted within 0.2 %, DeepSeek's unfused one aside."""
    rows = {row.name: row for row in read_rows()}
    assert len(rows) >= 25
    assert rows.keys() <= {*ARCHITECTURES}
    far = {name for name, row in rows.items() if abs(row.step.difference) > 0.002 * row.step.run}
    assert far <= {"deepseek-v2-lite"}
    far = {name for name, row in rows.items() if abs(row.answer.difference) > _DECODES_BY_COPIES * row.answer.run}
    assert far == set()


def test_differences_are_shown_with_their_sign() -> None:
    """Predicted minus run, in bytes; equal ones are 0."""
    row = Row(
        name="one",
        model_type="llama",
        attention="eager",
        step=Work(run=1000, predicted=1000, whole=2**30),
        answer=Work(run=2000, predicted=1984, whole=3 * 2**30),
    )
    assert "| `one` | llama (eager) | 1,000 | 0 | 2,000 | -16 | 1.00 GiB | 3.00 GiB |" in page([row])


def test_a_file_that_is_no_configuration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the file, and the exit code is 1."""
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SpecError, match=r"is not the config\.json of a model"):
        config_cases(tmp_path / "config.json", tmp_path)
    assert main(["--config", str(tmp_path / "config.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.nightly
def test_the_row_of_a_configuration_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user's own config.json is run and predicted like the table's rows; here it is a small model itself."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shrunk(MODELS["olmo-2-7b"].config)))
    assert main(["--config", str(folder / "config.json"), "--attention", "eager"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `mine` | olmo2 (eager) |")]
    assert [cell.strip() for cell in line.split("|")][4] == "0"
