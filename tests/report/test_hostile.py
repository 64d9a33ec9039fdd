"""A report of any record, whatever it holds, is safe to read, or one clear error says why there is none."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.baselines.reading import may_hold_longer, read_records
from hpc_core.case.errors import SpecError
from hpc_core.record.record import record_to_json
from hpc_core.report.csv import COLUMNS, records_csv
from hpc_core.report.entry import entries_of
from hpc_core.report.markdown import markdown
from hpc_core.report.page import page
from hpc_core.report.terminal import render
from tests.report.hostile import check_error, check_markdown, check_page, numbers, texts
from tests.report.many_records import failed, measured

PLAIN = json.loads(record_to_json(measured()[0]))

nested = st.recursive(
    numbers | texts, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2)
)


@given(
    nested | st.lists(st.text(st.sampled_from('a"\\/\n\u00e9\U0001f600'), max_size=60), max_size=4),
    st.integers(0, 40),
    st.booleans(),
)
def test_no_long_text_is_overlooked(content: Any, most: int, ascii_only: bool) -> None:
    """If a text of a document is longer than the limit, the quick check of its bytes says that one may be."""

    def longest(value: Any) -> int:
        if isinstance(value, str):
            return len(value)
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        return max(map(longest, parts), default=0)

    raw = json.dumps(content, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    if longest(content) > most:
        assert may_hold_longer(raw, most)


def test_a_usual_record_passes_the_quick_check() -> None:
    """A usual record passes the quick check, so its texts are not all read."""
    assert not may_hold_longer(record_to_json(measured()[0]), 4000)


def metric() -> st.SearchStrategy[dict[str, Any]]:
    shape = {"noise": st.just("exact"), "better": st.just("lower"), "depends_on": st.just(["case"])}
    return st.fixed_dictionaries({"value": numbers, "unit": texts, "note": texts, **shape})


def timeline() -> st.SearchStrategy[dict[str, Any]]:
    column = st.lists(st.integers(-(2**66), 2**66), min_size=3, max_size=3)
    columns = st.dictionaries(st.sampled_from(["weights", "<b>"]), column, min_size=1)
    names = st.lists(texts, min_size=1, max_size=1)
    return st.fixed_dictionaries(
        {"phases": names, "events": column, "phase": st.just([0, 0, 0]), "bytes_by_category": columns}
    )


HOSTILE: dict[str, st.SearchStrategy[Any]] = {
    "case.id": texts,
    "case.model": st.fixed_dictionaries({"weights": st.just("folder"), "path": texts}),
    "circumstances.machine.name": texts,
    "circumstances.machine.key": texts,
    "circumstances.stack": st.dictionaries(texts, texts, max_size=3),
    "circumstances.notes": st.lists(texts, max_size=3),
    "circumstances.started_at": texts,
    "circumstances.commit": texts,
    "circumstances.python": texts,
    "circumstances.gpu": st.fixed_dictionaries({"x": nested}),
    "circumstances.ceilings": st.fixed_dictionaries({"copy_bytes_per_s": numbers, "matmul_<b>_flop_per_s": numbers}),
    "metrics.peak_bytes": metric(),
    "metrics.<script>": metric(),
    "metrics.busy_decode_token_s": metric(),
    "kernel_families": st.dictionaries(
        texts, st.fixed_dictionaries({"seconds": numbers, "kernels": st.integers()}), max_size=2
    ),
    "makers_at_peak": st.dictionaries(texts, st.integers(), max_size=2),
    "timeline": timeline(),
    "failure": st.fixed_dictionaries({"kind": st.just("crash"), "message": texts, "phase": texts}),
    "reasons": st.lists(texts, min_size=1, max_size=2),
}
"""The values that replace a field, by its path."""
STATUS = {"failure": "failed", "reasons": "invalid"}


@st.composite
def hostile(draw: st.DrawFn) -> dict[str, Any]:
    """A record with up to four fields that no program of ours wrote."""
    record: dict[str, Any] = json.loads(json.dumps(PLAIN))
    for path in draw(st.lists(st.sampled_from(sorted(HOSTILE)), min_size=1, max_size=4, unique=True)):
        *parents, name = path.split(".")
        parent_node = record
        for parent in parents:
            parent_node = parent_node[parent]
        parent_node[name] = draw(HOSTILE[path])
        record["status"] = STATUS.get(path, record["status"])
    return record


@given(hostile())
def test_any_record_gives_a_safe_report_or_one_clear_error(record: dict[str, Any]) -> None:
    """A report has no tags, links, handlers or scripts but its own, no formulas and no escape sequences."""
    folder = Path(tempfile.gettempdir()) / f"hpc-core-hostile-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    path = folder / "record.json"
    path.write_bytes(json.dumps(record).encode("utf-8", errors="surrogatepass"))
    try:
        entries = entries_of(read_records([path]).records)
    except SpecError as error:
        check_error(str(error))
        return
    check_page(page(entries))
    check_markdown(markdown(entries))
    _check_csv(records_csv(entries))
    assert "\x1b" not in render([entry.row for entry in entries], width=80, color=False)


def _check_csv(text: str) -> None:
    rows = list(csv.reader(io.StringIO(text)))
    assert {len(row) for row in rows} == {len(COLUMNS)}
    numeric = {COLUMNS.index(name) for name in ("value", "sample_min", "sample_max", "accepted")}
    for row in rows:
        assert not [
            cell for index, cell in enumerate(row) if cell.startswith(("=", "+", "-", "@")) and index not in numeric
        ]


@given(
    st.binary(max_size=60)
    | st.sampled_from([b"[" * 100_000, b'{"benchmarks":' + b"[" * 100_000, b'{"accepted":{}}', b"null", b""])
)
def test_any_bytes_give_one_clear_error(raw: bytes) -> None:
    """A file that holds no record is refused by name, whatever is in it."""
    path = Path(tempfile.gettempdir()) / f"hpc-core-bytes-{os.getpid()}.json"
    path.write_bytes(raw)
    with pytest.raises(SpecError, match=r"hpc-core-bytes"):
        read_records([path])


def test_ten_megabytes_of_text_stay_out_of_the_page(tmp_path: Path) -> None:
    """A message of 10 MB is cut, and the page stays small."""
    record = failed(measured()[0], "A<b>" * 2_500_000)
    (tmp_path / "r.json").write_bytes(record_to_json(record))
    entries = entries_of(read_records([tmp_path / "r.json"]).records)
    assert len(page(entries)) < 100_000
    assert len(markdown(entries)) < 10_000


def test_a_name_that_is_a_path_is_refused(tmp_path: Path) -> None:
    """A machine's key that is a path or too long for a file's name is refused."""
    record = measured()[0]
    for key in ("../../etc", "/etc", "a" * 5000):
        machine = msgspec.structs.replace(record.circumstances.machine, key=key)
        circumstances = msgspec.structs.replace(record.circumstances, machine=machine)
        (tmp_path / "r.json").write_bytes(record_to_json(msgspec.structs.replace(record, circumstances=circumstances)))
        with pytest.raises(SpecError, match=r"r\.json.*machine's key"):
            read_records([tmp_path / "r.json"])


def test_a_file_that_is_not_regular_is_refused(tmp_path: Path) -> None:
    """Pipes, devices and dangling links are refused without being opened."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(SpecError, match="no record found"):
        read_records([tmp_path])
    with pytest.raises(SpecError, match="not a regular file"):
        read_records([tmp_path / "pipe.json"])
