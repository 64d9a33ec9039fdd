"""Read baselines as they were at a commit, and find what changed since."""

from __future__ import annotations

from pathlib import Path

import msgspec

from hpc_core.baselines.accept import changes_between
from hpc_core.baselines.baseline import (
    Baseline,
    Change,
    Lookup,
    Missing,
)
from hpc_core.baselines.history import Session, checked_lines, sessions_of_lines
from hpc_core.baselines.lookup import (
    baseline_path,
    find,
    history_path,
    parsed,
)
from hpc_core.record.git import contents, listing, resolved


class PastBaselines:
    """All baselines of a commit."""

    def __init__(self, root: Path, revision: str) -> None:
        """Read the folder `root` at a revision; without the folder there are no baselines.

        Raises:
            RepositoryError: there is no such revision, or `root` is not in a repository.
        """
        self._root = root
        self._folder = folder = next(each for each in (root, *root.resolve().parents) if each.is_dir())
        self.commit = resolved(folder, revision)
        paths = [path for path in listing(folder, self.commit, root) if path.suffix == ".json"]
        raws = contents(folder, [(self.commit, path) for path in paths])
        whole = root.resolve()
        self._raw = {path.resolve().relative_to(whole): raw for path, raw in zip(paths, raws, strict=True)}

    def find(self, key: str, case_id: str) -> Lookup:
        """Return what `lookup.find` would have returned at the commit.

        Raises:
            BaselineError: as `baseline_path`.
        """
        path = baseline_path(Path(), key, case_id)
        raw = self._raw.get(path)
        label = f"{self.commit[:10]}:{self._root.name}/{path}"
        if raw is None:
            others = sorted(known.parts[0] for known in self._raw if known.parts[1:] == path.parts[1:])
            return Missing(path=label, elsewhere=tuple(others))
        return parsed(label, raw)

    def sessions(self, key: str, case_id: str, *, digest: str | None = None) -> tuple[Session, ...]:
        """Return what `history.sessions` would have returned at the commit.

        Raises:
            BaselineError: the history was damaged then; or as `baseline_path`.
        """
        path = history_path(self._root, key, case_id)
        raw = contents(self._folder, [(self.commit, path)])[0] or b""
        return sessions_of_lines(checked_lines(raw.splitlines(), f"{self.commit[:10]}:{path}"), digest)

    def known(self) -> tuple[tuple[str, str], ...]:
        """Return machine and case id of every file that could be a baseline."""
        paths = sorted(path for path in self._raw if len(path.parts) == 3)
        return tuple((path.parts[0], f"{path.parts[1]}/{path.stem}") for path in paths)


class BaselineChange(msgspec.Struct, frozen=True, kw_only=True):
    """A baseline that differs between two points in time."""

    machine: str
    case: str
    old: Lookup
    new: Lookup

    @property
    def path(self) -> str:
        """Its path below the folder of baselines."""
        return f"{self.machine}/{self.case}.json"

    @property
    def metrics(self) -> tuple[Change, ...]:
        """Old and new values of the metrics that differ; all metrics where the file was added or removed."""
        old, new = (lookup.metrics if isinstance(lookup, Baseline) else {} for lookup in (self.old, self.new))
        return changes_between(old, new)

    @property
    def reason(self) -> str | None:
        """Why the new one was accepted; None if it is not a sound baseline."""
        return self.new.accepted.reason if isinstance(self.new, Baseline) else None


def baseline_changes(root: Path, old: PastBaselines, new: PastBaselines | None = None) -> tuple[BaselineChange, ...]:
    """Return every baseline that differs between two commits, or between a commit and the files on disk."""
    now = new.known() if new is not None else known_on_disk(root)
    found = []
    for machine, case_id in sorted({*old.known(), *now}):
        before = old.find(machine, case_id)
        after = new.find(machine, case_id) if new is not None else find(root, machine, case_id)
        if not _alike(before, after):
            found.append(BaselineChange(machine=machine, case=case_id, old=before, new=after))
    return tuple(found)


def known_on_disk(root: Path) -> tuple[tuple[str, str], ...]:
    """Return machine and case id of every file in a folder that could be a baseline."""
    paths = [path.relative_to(root) for path in root.glob("*/*/*.json")]
    return tuple((path.parts[0], f"{path.parts[1]}/{path.stem}") for path in paths if not path.name.startswith("."))


def _alike(one: Lookup, other: Lookup) -> bool:
    if type(one) is not type(other):
        return False
    return one == other if isinstance(one, Baseline) else _without_place(one) == _without_place(other)


def _without_place(lookup: Lookup) -> Lookup:
    assert not isinstance(lookup, Baseline)
    if isinstance(lookup, Missing):
        return Missing(path="")
    return msgspec.structs.replace(lookup, path="")
