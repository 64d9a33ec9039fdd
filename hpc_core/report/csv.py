"""All metrics of all records as CSV, one row for each metric, for a spreadsheet or a data frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from hpc_core.record.plain import plain
from hpc_core.record.record import Record
from hpc_core.report.entry import Entry

COLUMNS = (
    "case",
    "digest",
    "kind",
    "machine",
    "machine_name",
    "status",
    "verdict",
    "started_at",
    "commit",
    "metric",
    "unit",
    "value",
    "samples",
    "sample_min",
    "sample_max",
    "noise",
    "gated",
    "accepted",
    "metric_verdict",
    "note",
    "stack",
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_LONGEST = 300


def records_csv(entries: Iterable[Entry]) -> str:
    """Return a table with one line for each metric of every record, older sessions included; a record without metrics has one line.

    Numbers are written as Python's repr. A text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in entries:
        for record in entry.past:
            if record is not entry.record:
                writer.writerows(_lines(record, None))
        writer.writerows(_lines(entry.record, entry))
    return stream.getvalue()


def _lines(record: Record, entry: Entry | None) -> list[list[str]]:
    """Return the lines of a record; `entry` is given for the newest one, which was judged."""
    seen, judgement = record.circumstances, None if entry is None else entry.judgement
    verdicts = {} if judgement is None else {each.metric: each for each in judgement.metrics}
    stack = " ".join(f"{name}={version}" for name, version in sorted(seen.stack.items()))
    verdict = "" if entry is None else entry.row.verdict
    head = [record.case.id, record.case.digest, record.case.kind, seen.machine.key, seen.machine.name, record.status]
    head = [*map(_text, head), verdict, _text(seen.started_at), _text(seen.commit or "")]
    lines = []
    for name, metric in sorted(record.metrics.items()):
        samples, judged = metric.samples or (), verdicts.get(name)
        numbers = [
            repr(metric.value),
            str(len(samples)),
            *(repr(each(samples)) if samples else "" for each in (min, max)),
        ]
        state = [metric.noise, str(metric.gated).lower()]
        accepted = ["", ""] if judged is None else ["" if judged.old is None else repr(judged.old), str(judged.verdict)]
        tail = [_text(metric.note or ""), _text(stack)]
        lines.append([*head, _text(name), _text(metric.unit), *numbers, *state, *accepted, *tail])
    why = record.failure.message if record.failure is not None else " ".join(record.reasons)
    empty = [""] * (len(COLUMNS) - len(head) - 2)
    return lines or [[*head, *empty, _text(why), _text(stack)]]


def _text(value: str) -> str:
    """Return one line that no spreadsheet runs as a formula."""
    line = " ".join(plain(value, _LONGEST).split())
    return f"'{line}" if line.startswith(_FORMULA) else line
