"""Reuse records of an earlier run that still hold, so that a long run can be split: `--perf-resume DIR`.

A record is reused only if the case, the code, the stack and the machine are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.errors import RepositoryError, SpecError
from hpc_core.plugin.repeats import Plan
from hpc_core.record.environment import (
    commit,
    machine,
    stack,
    visible_gpus,
)
from hpc_core.record.files import write_whole
from hpc_core.record.git import CODE_SUFFIXES, git
from hpc_core.record.record import Record, record_from_json

_CODES = "code-states.json"


class Earlier:
    """The records that an earlier run left in a folder.

    Args:
        folder: the records, as `--perf-records` writes them. It may be empty or missing.
        plan: how many processes a case needs.
        baselines: changes in this folder are ignored: accepting one case must not invalidate the records of others.
        fault: the fault that this run injects.
    """

    def __init__(self, folder: Path, plan: Plan, *, baselines: Path, fault: str | None = None) -> None:
        self._folder = folder
        self._plan = plan
        self._fault = fault
        self._code = code_state(Path.cwd(), (folder, baselines))
        self._codes = self._read_codes()
        self.notes: list[str] = []
        """A line for each record that was found: reused, or why not."""

    def _read_codes(self) -> dict[str, str]:
        try:
            return msgspec.json.decode((self._folder / _CODES).read_bytes(), type=dict[str, str])
        except (OSError, msgspec.MsgspecError):
            return {}

    def record(self, case: Case, device: Literal["cpu", "cuda"]) -> Record | None:
        """Return the record of this case that can replace a run, or None; `notes` explains why.

        It may have fewer processes than planned: the missing ones can be added on the same GPU.
        """
        path = self._folder / f"{case.id}.json"
        if not path.exists():
            return None
        try:
            found = record_from_json(path.read_bytes())
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
        checks = (
            (found.status != "ok", f"the earlier run was {found.status}"),
            (found.case.digest != case.digest, f"the case changed, digest {found.case.digest} to {case.digest}"),
            (then.fault != self._fault, f"the earlier run had the fault {then.fault}, this one has {self._fault}"),
            (then.machine.key != machine(device).key, f"it was measured on {then.machine.key}"),
            (bool(packages), f"{', '.join(packages)} changed since"),
            (then.commit != revision, f"it was measured at commit {then.commit}, this is {revision}"),
            (revision is None, "neither git nor HPC_CORE_COMMIT identifies this code"),
            (self._codes.get(case.id) != self._code, "uncommitted changes differ from those that it was measured with"),
            (done < self._plan.total(found) and gpu != _gpu_uuid(), f"its {done} processes ran on another GPU"),
        )
        return next((reason for is_so, reason in checks if is_so), None)

    def keep(self, case_id: str) -> None:
        """Store which code a record that was just written belongs to."""
        if self._codes.get(case_id) != self._code:
            self._codes[case_id] = self._code
            write_whole(self._folder / _CODES, msgspec.json.encode(self._codes, order="sorted") + b"\n")


def _gpu_uuid() -> str | None:
    gpus = visible_gpus()
    return str(gpus[0]["uuid"]) if gpus else None


def code_state(folder: Path, ignoring: Sequence[Path] = ()) -> str:
    """Return a digest of commit and uncommitted changes of the git repository around `folder`, new files included.

    Outside a repository, or without git, it names the commit that `environment.commit` returns.
    """
    excluded = [f":(exclude){path.resolve()}" for path in ignoring if path.resolve().is_relative_to(folder.resolve())]
    digest = hashlib.sha256()
    try:
        for arguments in (
            ["rev-parse", "HEAD"],
            ["diff", "HEAD", "--binary", "--", ".", *excluded],
            ["ls-files", "-z", "--others", "--exclude-standard", "--", ".", *excluded],
        ):
            output = git(folder, *arguments)
            if arguments[0] != "ls-files":
                digest.update(output)
    except RepositoryError:
        return f"no git, commit {commit(str(folder))[0]}"
    for name in sorted(filter(None, output.split(b"\0"))):
        path = folder / name.decode("utf-8", "surrogateescape")
        if path.suffix in CODE_SUFFIXES and path.is_file():
            digest.update(name + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
