"""Collect a case over time: its accepted records, those in the history of git, and records in folders. Each counts once."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from hpc_core.baselines.baseline import Baseline, gated_metrics
from hpc_core.baselines.history import accepted_records
from hpc_core.baselines.lookup import baseline_path, history_path, parsed
from hpc_core.case.errors import RepositoryError, SpecError
from hpc_core.record.files import read_record
from hpc_core.record.git import contents, revisions_of
from hpc_core.record.record import Metric, Record, record_from_json
from hpc_core.record.units import counted

Source = Literal["accepted", "git", "record"]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One session of a case, or one accepted baseline whose record is gone."""

    at: str
    """When it ran; for a baseline without its record, when it was accepted: ISO 8601, UTC."""
    commit: str | None
    source: Source
    """"accepted" now, accepted once and found in "git", or a "record" in a folder."""
    digest: str
    stack: dict[str, str]
    metrics: dict[str, Metric]


class OverTime(msgspec.Struct, frozen=True, kw_only=True):
    """The points of one case on one machine, oldest first, and notes on what was left out."""

    points: tuple[Point, ...]
    notes: tuple[str, ...]


def over_time(root: Path, key: str, case_id: str, records: Sequence[Path] = (), *, git: bool = True) -> OverTime:
    """Return everything that is known of a case on a machine, of the newest digest of the case only.

    Args:
        root: the folder of baselines.
        key: of the machine.
        case_id: the whole id.
        records: folders of record files, as `--perf-records` writes them; other cases and machines in them are ignored.
        git: whether to search the history of git too.

    Raises:
        BaselineError: the history on disk is damaged; or as `baseline_path`.
        SpecError: a folder of records does not exist.
    """
    notes: list[str] = []
    found = [_of_record(record, "accepted") for record in accepted_records(root, key, case_id)]
    if git:
        try:
            found += _in_git(root, key, case_id)
        except RepositoryError as error:
            notes.append(f"nothing from git: {error}")
    found += [_of_record(record, "record") for record in _in_folders(records, key, case_id, notes)]
    points = sorted(_each_once(found), key=lambda point: moment(point.at))
    chosen = [point for point in points if point.digest == points[-1].digest]
    if len(chosen) < len(points):
        notes.append(f"left out, another digest of the case: {counted(len(points) - len(chosen), 'older point')}")
    return OverTime(points=tuple(chosen), notes=tuple(notes))


def _of_record(record: Record, source: Source) -> Point:
    run = record.circumstances
    return Point(
        at=run.started_at,
        commit=run.commit,
        source=source,
        digest=record.case.digest,
        stack=run.stack,
        metrics=record.metrics,
    )


def _in_git(root: Path, key: str, case_id: str) -> Iterator[Point]:
    """Return what git holds: every line that was ever in the history, and the baselines whose record it never held."""
    history, baseline = history_path(root, key, case_id), baseline_path(root, key, case_id)
    folder = next(each for each in (root, *root.resolve().parents) if each.is_dir())
    commits = [revision.commit for revision in revisions_of(folder, [history, baseline])]
    raws = contents(folder, [(commit, path) for commit in commits for path in (history, baseline)])
    lines = dict.fromkeys(line for raw in raws[::2] for line in (raw or b"").splitlines())
    records = [record for record in map(_intact, lines) if record is not None]
    yield from (_of_record(record, "git") for record in records)
    proven = [(record.circumstances.commit, gated_metrics(record)) for record in records]
    for raw in dict.fromkeys(raws[1::2]):
        lookup = None if raw is None else parsed(str(baseline), raw)
        if isinstance(lookup, Baseline) and (lookup.accepted.commit, lookup.metrics) not in proven:
            yield Point(
                at=lookup.accepted.at,
                commit=lookup.accepted.commit,
                source="git",
                digest=lookup.digest,
                stack=lookup.stack,
                metrics=lookup.metrics,
            )


def _intact(line: bytes) -> Record | None:
    try:
        return record_from_json(line)
    except SpecError:  # of another schema, or damaged in that commit
        return None


def _record(path: Path) -> Record | None:
    try:
        return read_record(path)
    except SpecError:
        return None


def _in_folders(folders: Iterable[Path], key: str, case_id: str, notes: list[str]) -> Iterator[Record]:
    """Return the sound records of this case and machine in these folders, and note how many others there are."""
    foreign = unsound = 0
    for folder in folders:
        if not folder.is_dir():
            raise SpecError(f"{folder}: no such folder. Records are written by pytest --benchmark --perf-records=DIR.")
        for path in sorted(folder.rglob("*.json")):
            record = _record(path)
            if record is None:
                foreign += 1
            elif record.case.id == case_id and record.circumstances.machine.key == key:
                unsound += record.status != "ok"
                if record.status == "ok":
                    yield record
    if foreign:
        notes.append(f"left out, not a record of this schema: {counted(foreign, 'file')} of the folders")
    if unsound:
        notes.append(f"left out, invalid or failed: {counted(unsound, 'record')}")


def _each_once(points: Iterable[Point]) -> list[Point]:
    """Return the points without duplicates; accepted ones win over git, git over folders."""
    unique: dict[tuple[str, bytes], Point] = {}
    for point in points:
        content = msgspec.json.encode((point.commit, point.digest, point.metrics), order="sorted")
        unique.setdefault((point.at, content), point)
    return list(unique.values())


def moment(at: str) -> datetime.datetime:
    """Return the time that a record states, to sort by; the earliest possible time where it states none. No text raises."""
    try:
        stated = datetime.datetime.fromisoformat(at)
    except ValueError:
        return datetime.datetime.min.replace(tzinfo=datetime.UTC)
    return stated if stated.tzinfo else stated.replace(tzinfo=datetime.UTC)
