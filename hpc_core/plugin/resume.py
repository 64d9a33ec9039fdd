"""Reuse records of an earlier run that still hold, so that a long run can be split: `--perf-resume DIR`.

A record is reused only if the case, the code, the stack and the machine are the same. Code is every file of the repository,
every installed package, and whatever else Python imports from.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse
from urllib.request import url2pathname

import msgspec
import pytest

from hpc_core.case.case import Case
from hpc_core.case.errors import RepositoryError, SpecError
from hpc_core.plugin.repeats import Plan
from hpc_core.record.environment import commit, machine, stack, visible_gpus
from hpc_core.record.files import read_regular, write_whole
from hpc_core.record.git import content, is_ignored, top
from hpc_core.record.record import Record, record_from_json
from hpc_core.record.settings import settings, variables

_CODES = ".code-states.json"
_NO_CODE = frozenset({"__pycache__", ".pytest_cache", ".benchmarks"})
"""Folders that pytest, its benchmarks and Python write."""
_MOST_NAMES = 2


class _Codes(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The file beside the records: which code each was measured with."""

    cases: dict[str, str] = {}
    """The key of the state, by case."""
    states: dict[str, dict[str, str]] = {}
    """A digest by path or package."""


class Earlier:
    """The records that an earlier run left in a folder.

    Args:
        folder: the records, as `--perf-records` writes them. It may be empty or missing.
        plan: how many processes a case needs.
        ignoring: files and folders that the run itself writes; changes in them are no changes of the code.
        code: folders and files that the run takes code from, beside the working folder and what Python imports from.
        fault: the fault that this run injects.

    Raises:
        pytest.UsageError: some of the code lies outside git repositories, so nobody can tell whether it changed.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        ignoring: Sequence[Path] = (),
        code: Sequence[Path] = (),
        fault: str | None = None,
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._fault = fault
        self._own = tuple(path.resolve() for path in (folder, *ignoring))
        self._from = (Path.cwd(), *code)
        try:
            self._state()
        except RepositoryError as error:
            raise pytest.UsageError(
                f"--perf-resume: nobody can tell whether this code changed since an earlier run: {str(error).rstrip('.')}. "
                "Drop --perf-resume, or put the code under git: git init && git add -A && git commit."
            ) from error
        self._codes = self._read_codes()
        self._began_with: dict[str, str] = {}
        self.notes: list[str] = []
        """A line for each record that was found: reused, or why not."""

    def _state(self) -> dict[str, str]:
        return code_state([*self._from, *_imported_from()], self._own)

    def _read_codes(self) -> _Codes:
        try:
            return msgspec.json.decode(read_regular(self._folder / _CODES), type=_Codes)
        except (OSError, msgspec.MsgspecError):
            return _Codes()

    def record(self, case: Case, device: Literal["cpu", "cuda"]) -> Record | None:
        """Return the record of this case that can replace a run, or None; `notes` explains why.

        It may have fewer processes than planned: the missing ones can be added on the same GPU.
        """
        path = self._folder / f"{case.id}.json"
        try:
            self._began_with = self._state()
        except RepositoryError as error:
            self._began_with = {}
            self.notes.append(f"{case.id} runs again: {error}")
            return None
        if not path.exists():
            return None
        try:
            found = record_from_json(read_regular(path))
        except (OSError, SpecError) as error:
            self.notes.append(f"{case.id} runs again: {path} is not a record ({error})")
            return None
        why = self._moved(found, case, device)
        self.notes.append(
            f"{case.id} reused from {path}, measured at {found.circumstances.started_at}"
            if why is None
            else f"{case.id} runs again: {why}"
        )
        return found if why is None else None

    def _moved(self, found: Record, case: Case, device: Literal["cpu", "cuda"]) -> str | None:
        """Return why an earlier record cannot replace a run now, or None."""
        then, revision, now = found.circumstances, commit()[0], stack(device)
        packages = [name for name in sorted(now | then.stack) if then.stack.get(name) != now.get(name)]
        done, gpu = max(1, len(found.processes)), then.gpu.get("before", {}).get("uuid")
        code = self._codes.states.get(self._codes.cases.get(case.id, ""))
        changed = [] if code is None else _differing(code, self._began_with)
        set_then, set_now = variables(then.settings or {}), variables(settings())
        switched = _differing(set_then, set_now)
        checks = (
            (found.status != "ok", f"the earlier run was {found.status}"),
            (found.case.digest != case.digest, f"the case changed, digest {found.case.digest} to {case.digest}"),
            (then.fault != self._fault, f"the earlier run had the fault {then.fault}, this one has {self._fault}"),
            (then.machine.key != machine(device).key, f"it was measured on {then.machine.key}"),
            (bool(packages), f"{', '.join(packages)} changed since"),
            (bool(switched), f"set otherwise than when it was measured: {_some(switched)}"),
            (then.python != platform.python_version(), f"it was measured with Python {then.python}"),
            (then.commit != revision, f"it was measured at commit {then.commit}, this is {revision}"),
            (code is None, f"{self._folder / _CODES} does not say which code it was measured with"),
            (bool(changed), f"changed since it was measured: {_some(changed)}"),
            (done < self._plan.total(found) and gpu != _gpu_uuid(), f"its {done} processes ran on another GPU"),
        )
        return next((reason for is_so, reason in checks if is_so), None)

    def keep(self, case_id: str) -> None:
        """Store which code a record that was just written belongs to: none, if the code changed while the case ran."""
        if self._began_with and self._state() == self._began_with:
            key = hashlib.sha256(msgspec.json.encode(self._began_with, order="sorted")).hexdigest()[:16]
            self._codes.cases[case_id] = key
            self._codes.states[key] = self._began_with
        else:
            self._codes.cases.pop(case_id, None)
        used = set(self._codes.cases.values())
        self._codes.states = {key: state for key, state in self._codes.states.items() if key in used}
        write_whole(self._folder / _CODES, msgspec.json.encode(self._codes, order="sorted") + b"\n")


def _differing(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _gpu_uuid() -> str | None:
    gpus = visible_gpus()
    return str(gpus[0]["uuid"]) if gpus else None


def code_state(places: Iterable[Path], ignoring: Sequence[Path] = ()) -> dict[str, str]:
    """Return a digest of each part of the code: by path, what the repositories around `places` hold; by name, each installed package.

    Raises:
        RepositoryError: a place lies outside every repository, in one without a commit, or is ignored by git.
    """
    found = dict(_installed())
    roots = set()
    for place in dict.fromkeys(path.resolve() for path in places):
        folder = place if place.is_dir() else place.parent
        if is_ignored(place):
            raise RepositoryError(f"git ignores {place}, which code is imported from.")
        roots.add(top(folder).resolve())
    for root in sorted(roots):
        for path, digest in content(root).items():
            is_own = any(own == path or own in path.parents for own in ignoring)
            if not is_own and _NO_CODE.isdisjoint(path.relative_to(root).parts):
                found[str(path)] = digest
    return found


def _imported_from() -> list[Path]:
    """Return the folders and archives that Python imports from, except its own and those of installed packages; and editable packages."""
    names = ("stdlib", "platstdlib", "scripts")  # a program such as `pytest` puts its own folder on the path
    user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    own = tuple(Path(path).resolve() for path in (*map(sysconfig.get_path, names), user, f"{sys.base_prefix}/bin"))
    entries = [Path(entry).resolve() for entry in sys.path if Path(entry).exists()]
    installed = {"site-packages", "dist-packages"}
    return _editable() + [
        entry
        for entry in entries
        if installed.isdisjoint(entry.parts) and not any(entry.is_relative_to(folder) for folder in own)
    ]


@functools.cache
def _installed() -> dict[str, str]:
    """Return a digest of what each installed package consists of: of its list of files, which has their hashes."""
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        files = package.read_text("RECORD") or ""
        text = f"{package.version}\n{files}"
        found.setdefault(f"package {name}", hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16])
    return found


def _editable() -> list[Path]:
    """Return the folders of packages that are installed in place (pip install -e)."""
    folders = []
    for package in importlib.metadata.distributions():
        origin = json.loads(package.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            folders.append(Path(url2pathname(urlparse(origin["url"]).path)))
    return folders
