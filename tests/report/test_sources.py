"""Reports read records from files, folders, a run's JSON, and baselines with and without history, each record once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from hpc_core.baselines.history import accepted_records
from hpc_core.baselines.pull_request import Loosening, PullRequest, write_pull_request
from hpc_core.baselines.reading import read_records
from hpc_core.case.errors import SpecError
from hpc_core.record.record import Record, record_to_json
from hpc_core.report.entry import entries_of
from tests.report.many_records import H100, many, measured, written

LORA = "llama-3.2-3b/lora"


def lora_sessions() -> tuple[Record, ...]:
    return accepted_records(H100.parent, H100.name, LORA)


def test_a_folder_of_baselines_gives_every_accepted_session() -> None:
    """Each baseline gives its whole history once, and the newest session is shown."""
    entries = {entry.case: entry for entry in entries_of(read_records([H100, H100 / f"{LORA}.json"]).records)}
    assert entries[LORA].past == lora_sessions()
    assert entries[LORA].record == lora_sessions()[-1]
    assert len(entries) == len(list(H100.glob("*/*.json")))


def test_cases_are_sorted_by_their_numbers() -> None:
    """A batch of 4 comes before one of 16, whatever the order of files and however long a number is."""
    record = lora_sessions()[-1]
    ids = ["m2/a", "m10/a", "m/a", "m/a-b4", "m/a-b04", "m/a-b16", "m/a-b32-100", f"m/a-b{'9' * 5000}", "m/b-1"]
    copies = [
        msgspec.structs.replace(record, case=msgspec.structs.replace(record.case, id=each)) for each in reversed(ids)
    ]
    ordered = [entry.case for entry in entries_of(copies)]
    assert [each for each in ordered if each != "m/a-b04"] == [each for each in ids if each != "m/a-b04"]
    assert abs(ordered.index("m/a-b04") - ordered.index("m/a-b4")) == 1


def test_a_baseline_without_history_shows_its_gated_values(tmp_path: Path) -> None:
    """A baseline without history shows only its gated values, and a note says so."""
    shutil.copy(H100 / f"{LORA}.json", tmp_path / "lora.json")
    (record,) = read_records([tmp_path]).records
    assert record.metrics["peak_bytes"] == lora_sessions()[-1].metrics["peak_bytes"]
    assert "step_s" not in record.metrics
    assert "gated values" in record.circumstances.notes[0]


def test_the_json_of_a_run_holds_its_records(tmp_path: Path) -> None:
    """--benchmark-json holds whole records; a file of another suite is refused."""
    records = many(3)
    benches = [{"extra_info": {"record": {"case": "x", "record": msgspec.to_builtins(each)}}} for each in records]
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"machine_info": {}, "benchmarks": [*benches, {"extra_info": {}}]}))
    assert list(read_records([run]).records) == records
    run.write_text(json.dumps({"benchmarks": [{"extra_info": {"record": 3}}, {}]}))
    with pytest.raises(SpecError, match=r"run\.json: 2 benchmarks of pytest-benchmark, none of them with a record"):
        read_records([run])


def test_an_unknown_file_is_noted_in_a_folder_and_refused_by_name(tmp_path: Path) -> None:
    """A file without a record is noted where its folder was given, and refused where it was named itself."""
    written(tmp_path, many(2))
    (tmp_path / "other.json").write_text('{"name": "package.json"}')
    read = read_records([tmp_path])
    assert len(read.records) == 2
    assert [note.partition(": ")[0] for note in read.notes] == [f"left out {tmp_path / 'other.json'}"]
    with pytest.raises(SpecError, match=r"other\.json: Not a record"):
        read_records([tmp_path, tmp_path / "other.json"])


def test_what_a_pull_request_loosens_is_read_beside_its_records(tmp_path: Path) -> None:
    """Without escape sequences, whoever wrote the file; one that is something else is left out with a note."""
    written(tmp_path, many(2))
    hidden = Loosening(what="limit \x1b[2J", old="1 %", new="9 %")
    write_pull_request(tmp_path, PullRequest(revision="main", merge_base="0123abc", loosened=(hidden,)))
    read = read_records([tmp_path])
    assert (len(read.records), read.notes) == (2, ())
    assert [line.partition(": ")[2] for line in read.loosened] == ["1 % → 9 %"]
    assert "\x1b" not in read.loosened[0]
    (tmp_path / "pull-request.json").write_text('{"loosened": 3}')
    read = read_records([tmp_path])
    assert read.loosened == ()
    assert "not what --perf-base writes" in read.notes[0]


def test_no_record_is_an_error(tmp_path: Path) -> None:
    """A missing path and a folder without records are errors that say how to get records."""
    with pytest.raises(SpecError, match="no such file or folder"):
        read_records([tmp_path / "nowhere"])
    with pytest.raises(SpecError, match="--perf-records=DIR"):
        read_records([tmp_path])


def test_sessions_of_another_digest_are_left_out() -> None:
    """Sessions of a case that has changed since are not compared with it."""
    newest = lora_sessions()[-1]
    older = msgspec.structs.replace(lora_sessions()[0], case=msgspec.structs.replace(newest.case, seed=7))
    (entry,) = entries_of([older, newest])
    assert entry.past == (newest,)


def test_rounds_of_one_process_give_no_range() -> None:
    """A range spans sessions and processes; ten steps of one session give none."""
    one, several = entries_of(lora_sessions()[-1:])[0], entries_of(lora_sessions())[0]
    assert len(one.record.metrics["step_s"].samples or ()) == 10
    assert one.spread("step_s") is None
    spread = several.spread("step_s")
    assert spread is not None
    assert spread.count == len(lora_sessions())
    medians = [record.metrics["step_s"].value for record in lora_sessions()]
    assert (spread.low, spread.high) == (min(medians), max(medians))


def test_reading_changes_no_record(tmp_path: Path) -> None:
    """Every committed record is read back equal."""
    for number, record in enumerate(measured()):
        (tmp_path / f"{number}.json").write_bytes(record_to_json(record))
    assert sorted(map(record_to_json, read_records([tmp_path]).records)) == sorted(map(record_to_json, measured()))
