"""Collect a case over time: its accepted records, those in the history of git, and records in folders. Each counts once."""

from __future__ import annotations

import datetime
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from hpc_core.baselines.baseline import Baseline, gated_metrics
from hpc_core.baselines.history import accepted_records
from hpc_core.baselines.lookup import baseline_path, history_path, parsed
from hpc_core.case.case import Case
from hpc_core.case.errors import RepositoryError, SpecError
from hpc_core.record.files import read_record
from hpc_core.record.git import contents, revisions_of, sizes
from hpc_core.record.record import Metric, Record, record_from_json
from hpc_core.record.units import counted, quantity

Source = Literal["accepted", "git", "record"]

MOST_POINTS = 500
"""Sessions of more than a year. Change points of as many take about a second for each noisy metric."""
_LARGEST_VERSION = 4 * 2**20
"""Bytes of one version of a file in git; a history has at most 1 MiB."""
_AT_ONCE = 16
"""Versions in memory."""
_MOST_BYTES = 128 * 2**20
"""Bytes of all versions in git that are read."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One session of a case, or one accepted baseline whose record is gone."""

    at: str
    """When it ran; for a baseline without its record, when it was accepted: ISO 8601, UTC."""
    commit: str | None
    source: Source
    """"accepted" now, accepted once and found in "git", or a "record" in a folder."""
    case: Case
    machine: str
    stack: dict[str, str]
    settings: dict[str, str] | None
    metrics: dict[str, Metric]

    @property
    def digest(self) -> str:
        """Return that of its case."""
        return self.case.digest


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
            found += _in_git(root, key, case_id, notes)
        except RepositoryError as error:
            notes.append(f"nothing from git: {error}")
    found += [_of_record(record, "record") for record in _in_folders(records, key, case_id, notes)]
    points = sorted(_each_once(found), key=lambda point: moment(point.at))
    chosen = [point for point in points if point.digest == points[-1].digest]
    if len(chosen) < len(points):
        notes.append(f"left out, another digest of the case: {counted(len(points) - len(chosen), 'older point')}")
    if len(chosen) > MOST_POINTS:
        notes.append(f"left out, more than {MOST_POINTS}: {counted(len(chosen) - MOST_POINTS, 'older point')}")
    return OverTime(points=tuple(chosen[-MOST_POINTS:]), notes=tuple(notes))


def _of_record(record: Record, source: Source) -> Point:
    run = record.circumstances
    return Point(
        at=run.started_at,
        commit=run.commit,
        source=source,
        case=record.case,
        machine=run.machine.key,
        stack=run.stack,
        settings=run.settings,
        metrics=record.metrics,
    )


def _in_git(root: Path, key: str, case_id: str, notes: list[str]) -> Iterator[Point]:
    """Return what git holds: every line that was ever in the history, and the baselines whose record it never held."""
    history, baseline = history_path(root, key, case_id), baseline_path(root, key, case_id)
    folder = next(each for each in (root, *root.resolve().parents) if each.is_dir())
    lines, proven, accepted = set[bytes](), set[bytes](), list[Baseline]()
    for path, raw in _versions(folder, (history, baseline), notes):
        if path == baseline:
            lookup = parsed(str(baseline), raw)
            accepted += [lookup] if isinstance(lookup, Baseline) else []
            continue
        for line in raw.splitlines():
            digest = hashlib.sha256(line).digest()
            record = None if digest in lines else _intact(line)
            lines.add(digest)
            if record is not None:
                proven.add(_fingerprint(record.circumstances.commit, gated_metrics(record)))
                yield _of_record(record, "git")
    for each in accepted:
        if _fingerprint(each.accepted.commit, each.metrics) not in proven:
            yield Point(
                at=each.accepted.at,
                commit=each.accepted.commit,
                source="git",
                case=each.spec,
                machine=each.machine.key,
                stack=each.stack,
                settings=each.settings,
                metrics=each.metrics,
            )


def _fingerprint(commit: str | None, metrics: Mapping[str, Metric]) -> bytes:
    return hashlib.sha256(msgspec.json.encode((commit, metrics), order="sorted")).digest()


def _versions(folder: Path, paths: Sequence[Path], notes: list[str]) -> Iterator[tuple[Path, bytes]]:
    """Return the versions of these files in git, oldest first; of too many bytes together, only the newest."""
    wanted = [(each.commit, path) for each in revisions_of(folder, paths) for path in paths]
    there = [(each, size) for each, size in zip(wanted, sizes(folder, wanted), strict=True) if size is not None]
    small = [(each, size) for each, size in there if size <= _LARGEST_VERSION]
    if large := len(there) - len(small):
        notes.append(
            f"left out, more than {quantity(_LARGEST_VERSION, 'bytes')} each: {counted(large, 'version')} in git"
        )
    together = itertools.accumulate(size for _, size in reversed(small))
    if old := sum(size > _MOST_BYTES for size in together):
        notes.append(f"left out, more than {quantity(_MOST_BYTES, 'bytes')}: {counted(old, 'older version')} in git")
    for first in range(old, len(small), _AT_ONCE):
        batch = [each for each, _ in small[first : first + _AT_ONCE]]
        for (_, path), raw in zip(batch, contents(folder, batch), strict=True):
            assert raw is not None  # it has a size
            yield path, raw


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
