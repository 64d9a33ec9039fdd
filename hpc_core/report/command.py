"""The commands that a report prints: to run a case again, to accept it, to find the commit. Each can be pasted as it is."""

from __future__ import annotations

from collections.abc import Iterable
from shlex import quote

import msgspec

from hpc_core.gate.metric import update_command


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """Runs one case, with the options that make the run the same."""

    case: str
    start: str = "pytest --benchmark"
    """The program, its switch, and the path of the test if it needs one."""
    options: str = ""
    """Such as " --perf-baselines=others"."""
    folder: str = ""
    """Where the command runs, below the root of the repository; empty if it is the root."""
    fault: str | None = None
    case_option: str = "--case"
    reason_option: str = "--reason"

    @property
    def run(self) -> str:
        """Return the command that runs the case again."""
        return f"{self._plain()}{f' --perf-fault {self.fault}' if self.fault else ''}"

    @property
    def accept(self) -> str:
        """Return the command that accepts what the case gives now; empty with a fault, whose numbers are never accepted."""
        return "" if self.fault else f'{self._plain()} --perf-update {self.reason_option} "…"'

    def bisect(self, good: str) -> str:
        """Return the command that finds the first bad commit after `good`; empty with a fault, which is in no commit."""
        if self.fault:
            return ""
        git, run = "git", f"{self._plain()} --perf-bisect"
        if self.folder:
            # git bisects from the root of a repository only.
            git, run = (
                'git -C "$(git rev-parse --show-toplevel)"',
                f"sh -c {quote(f'cd {quote(self.folder)} && {run}')}",
            )
        return f"{git} bisect start HEAD {good} && {git} bisect run {run}"

    def in_step(self, step: str) -> str:
        """Return a next step of the gate, which knows only the case, with these commands; empty if it asks to accept a fault."""
        accepting, plain = update_command(self.case), f"pytest --benchmark --case {self.case}"
        if accepting in step and self.fault:
            return ""
        return step.replace(accepting, self.accept).replace(plain, self.run)

    def _plain(self) -> str:
        return f"{self.start} {self.case_option} '{self.case}'{self.options}"


def accept_together(commands: Iterable[Command]) -> list[str]:
    """Return one command that accepts these cases for each place that cases run from; none for cases with a fault."""
    grouped: dict[Command, list[str]] = {}
    for command in commands:
        if command.fault is None:
            grouped.setdefault(msgspec.structs.replace(command, case=""), []).append(command.case)
    return [
        f"{each.start} "
        + " ".join(f"{each.case_option} '{case}'" for case in cases)
        + f'{each.options} --perf-update {each.reason_option} "…"'
        for each, cases in grouped.items()
    ]
