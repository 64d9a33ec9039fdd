"""Where a report's records come from: files, folders, a run's own JSON, baselines with and without history; each once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from hpc_core.baselines.history import accepted_records
from hpc_core.baselines.reading import read_records
from hpc_core.case.errors import SpecError
from hpc_core.record.record import Record, record_to_json
from hpc_core.report.entry import entries_of
from tests.report.many_records import (
    H100,
    many,
    measured,
    written,
)

LORA = "llama-3.2-3b/lora"


def of_lora() -> tuple[Record, ...]:
    return accepted_records(H100.parent, H100.name, LORA)


def test_a_folder_of_baselines_gives_every_accepted_session() -> None:
    """Each baseline brings its history, whole and once, and the newest session is the one that is shown."""
    entries = {entry.case: entry for entry in entries_of(read_records([H100, H100 / f"{LORA}.json"]).records)}
    assert entries[LORA].past == of_lora()
    assert entries[LORA].record == of_lora()[-1]
    assert len(entries) == len(list(H100.glob("*/*.json")))


def test_cases_stand_in_the_order_of_their_numbers() -> None:
    """A batch of 4 before one of 16, whatever the order of the files; and no number is too long to be compared."""
    record = of_lora()[-1]
    ids = ["m2/a", "m10/a", "m/a", "m/a-b4", "m/a-b04", "m/a-b16", "m/a-b32-100", f"m/a-b{'9' * 5000}", "m/b-1"]
    copies = [
        msgspec.structs.replace(record, case=msgspec.structs.replace(record.case, id=each)) for each in reversed(ids)
    ]
    seen = [entry.case for entry in entries_of(copies)]
    assert [each for each in seen if each != "m/a-b04"] == [each for each in ids if each != "m/a-b04"]
    assert abs(seen.index("m/a-b04") - seen.index("m/a-b4")) == 1


def test_a_baseline_without_history_shows_its_gated_values(tmp_path: Path) -> None:
    """They are what is left, and a note says so."""
    shutil.copy(H100 / f"{LORA}.json", tmp_path / "lora.json")
    (record,) = read_records([tmp_path]).records
    assert record.metrics["peak_bytes"] == of_lora()[-1].metrics["peak_bytes"]
    assert "step_s" not in record.metrics
    assert "gated values" in record.circumstances.notes[0]


def test_the_json_of_a_run_holds_its_records(tmp_path: Path) -> None:
    """What the plugin puts into --benchmark-json is the whole record; a file of another suite is refused by what it lacks."""
    records = many(3)
    benches = [{"extra_info": {"record": {"case": "x", "record": msgspec.to_builtins(each)}}} for each in records]
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"machine_info": {}, "benchmarks": [*benches, {"extra_info": {}}]}))
    assert list(read_records([run]).records) == records
    run.write_text(json.dumps({"benchmarks": [{"extra_info": {"record": 3}}, {}]}))
    with pytest.raises(SpecError, match=r"run\.json: 2 benchmarks of pytest-benchmark, none of them with a record"):
        read_records([run])


def test_a_stranger_in_a_folder_is_told_and_one_that_is_named_refused(tmp_path: Path) -> None:
    """A file that holds no record does not hide those beside it, nor is it passed over in silence."""
    written(tmp_path, many(2))
    (tmp_path / "other.json").write_text('{"name": "package.json"}')
    read = read_records([tmp_path])
    assert len(read.records) == 2
    assert [note.partition(": ")[0] for note in read.notes] == [f"left out {tmp_path / 'other.json'}"]
    with pytest.raises(SpecError, match=r"other\.json: Not a record"):
        read_records([tmp_path, tmp_path / "other.json"])


def test_nothing_is_an_error(tmp_path: Path) -> None:
    """No path, no record: one sentence, with how to get one."""
    with pytest.raises(SpecError, match="no such file or folder"):
        read_records([tmp_path / "nowhere"])
    with pytest.raises(SpecError, match="--perf-records=DIR"):
        read_records([tmp_path])


def test_another_digest_is_no_past_of_a_case() -> None:
    """Sessions of a case that was changed since are not compared with it."""
    newest = of_lora()[-1]
    older = msgspec.structs.replace(of_lora()[0], case=msgspec.structs.replace(newest.case, seed=7))
    (entry,) = entries_of([older, newest])
    assert entry.past == (newest,)


def test_rounds_of_one_process_are_no_replicates() -> None:
    """A range is drawn over sessions and processes; ten steps of one session give none."""
    one, several = entries_of(of_lora()[-1:])[0], entries_of(of_lora())[0]
    assert len(one.record.metrics["step_s"].samples or ()) == 10
    assert one.spread("step_s") is None
    spread = several.spread("step_s")
    assert spread is not None
    assert spread.count == len(of_lora())
    medians = [record.metrics["step_s"].value for record in of_lora()]
    assert (spread.low, spread.high) == (min(medians), max(medians))


def test_a_record_that_is_read_is_what_was_written(tmp_path: Path) -> None:
    """Cleaning changes no record of ours: every committed one comes back equal."""
    for number, record in enumerate(measured()):
        (tmp_path / f"{number}.json").write_bytes(record_to_json(record))
    assert sorted(map(record_to_json, read_records([tmp_path]).records)) == sorted(map(record_to_json, measured()))
