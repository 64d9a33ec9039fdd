"""`hpc-core faults --explain`: check that the explanation of a red case names what each fault does.

A clean run of the same case in the same session takes the place of the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from hpc_core.baselines.accept import unstored
from hpc_core.case.case import Case
from hpc_core.case.errors import BaselineError
from hpc_core.explain.before import before_of
from hpc_core.explain.explain import Cause, explain
from hpc_core.faults.catalogue import FAULTS
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Judgement
from hpc_core.launch.launcher import Launcher
from hpc_core.record.files import write_record, write_whole
from hpc_core.record.job import Job, Measure, Predict
from hpc_core.record.record import Record

TABLE_FILE = "explained.md"
EXPLAINED: Mapping[str, tuple[str, ...]] = {
    "gc-off": ("activations +", "LlamaAttention", "no longer recomputed"),
    "extra-kernel": ("add", "LlamaMLP"),
    "embeddings-fp32": ("weights +", "Embedding (embed_tokens)"),
    "optimizer-32bit": ("optimizer +", "lora_A"),
    "extra-clone": ("clone", "LlamaAttention"),
    "sync-per-layer": ("_local_scalar_dense", "LlamaMLP"),
}
"""What the explanation must contain: category, operator or kind of change, and module. A failed audit fact mentions none of them."""


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """One fault and its explanation."""

    fault: str
    case: str
    verdict: str
    cause: Cause | None
    problem: str = ""
    """Why there is nothing to compare."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The words that the explanation lacks."""
        text = " ".join(() if self.cause is None else self.cause.lines)
        return tuple(word for word in EXPLAINED.get(self.fault, ()) if word not in text)

    @property
    def good(self) -> bool:
        """Whether a cause was found that names what it should."""
        return self.cause is not None and not self.missing


def explained_faults(
    names: Iterable[str],
    launcher: Launcher,
    *,
    cases: Mapping[str, Case],
    tell: Callable[[str], None],
    predict: str | None = None,
    out: Path | None = None,
) -> list[Explained]:
    """Run (or predict) each case clean and with its fault. Return the explanations in the order of the names.

    A fault is not tried on a case whose clean run broke. Each record and the table so far are written to `out` immediately, so an
    interrupted run keeps its results.

    Raises:
        LaunchError: no worker can be started at all.
    """
    kind = Measure() if predict is None else Predict(gpu=predict)
    clean: dict[str, Record] = {}
    found: list[Explained] = []
    for name in names:
        case = cases[FAULTS[name].variant]
        if case.id not in clean:
            clean[case.id] = _written(launcher.run(Job(case=case, kind=kind)), out)
        before = clean[case.id]
        broke = before.failure is not None
        now = before if broke else _written(launcher.run(Job(case=case, kind=kind, fault=name)), out)
        found.append(explained(name, before, now))
        if out is not None:
            write_whole(out / TABLE_FILE, f"{cause_table(found)}\n".encode())
        tell(f"{'named' if found[-1].good else 'NOT NAMED':<9} {name:<18} {case.id}")
    return found


def _written(record: Record, out: Path | None) -> Record:
    """Write the record as `<shape>/<variant>[+<fault>].json` if there is a folder, and return it."""
    if out is not None:
        fault = "" if record.circumstances.fault is None else f"+{record.circumstances.fault}"
        write_record(out / f"{record.case.id}{fault}.json", record)
    return record


def explained(name: str, before: Record, now: Record) -> Explained:
    """Explain a record with a fault by a clean record of the same case."""
    problem = _problem(before, now)
    if problem:
        return Explained(fault=name, case=now.case.id, verdict="BROKEN", cause=None, problem=problem)
    judgement = _judgement(before, now)
    cause = explain(before_of(before), now, judgement)
    verdict = "not judged" if judgement is None else str(judgement.verdict)
    return Explained(fault=name, case=now.case.id, verdict=verdict, cause=cause)


def _problem(before: Record, now: Record) -> str:
    for which, record in (("clean run", before), ("run with the fault", now)):
        if record.failure is not None:
            return f"the {which} broke: {record.failure.message}"
    return ""


def _judgement(before: Record, now: Record) -> Judgement | None:
    try:
        return judge(now, unstored(before, reason="a clean run of the same session"))
    except BaselineError:
        return None


def cause_table(found: Iterable[Explained]) -> str:
    """Return a Markdown table."""
    lines = ["| fault | what it does | case | verdict | cause | named |", "|---|---|---|---|---|---|"]
    for each in found:
        text = each.problem if each.cause is None else "<br>".join(each.cause.lines)
        missing = ", ".join(f"`{word}`" for word in each.missing)
        named = "yes" if each.good else f"no: {missing or 'nothing was found'}"
        what = FAULTS[each.fault].summary
        lines.append(
            f"| `{each.fault}` | {what} | `{each.case}` | {each.verdict} | {_cell(text or 'nothing differs')} | {named} |"
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")
