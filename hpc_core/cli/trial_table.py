"""What the trials of faults came to: a summary for the terminal, a table in Markdown."""

from __future__ import annotations

from hpc_core.cli.trials import NO_TWIN, Trial

__all__ = ["markdown", "summary"]


def summary(trials: list[Trial], seconds: float) -> str:
    """One line for the whole; what only something else can see, and what was missed, by name."""
    waiting = [trial for trial in trials if trial.outcome.startswith("needs")]
    missed = [trial.fault.name for trial in trials if not trial.good]
    judged = len(trials) - len(waiting)
    alarms = sum(not trial.no_alarm for trial in trials)
    untried = all(trial.twin == NO_TWIN for trial in trials)
    twins = (
        "twins not run" if untried else "twins green" if not alarms else f"{alarms} of {len(trials)} twins not green"
    )
    lines = [f"{judged - len(missed)} of {judged} faults caught, {twins}, {seconds:.0f} s"]
    lines += [f"Not caught by a single run: {trial.fault.name} {trial.outcome}" for trial in waiting]
    if missed:
        lines.append(f"MISSED: {', '.join(missed)}")
    return "\n".join(lines)


def markdown(trials: list[Trial]) -> str:
    """Return the table in Markdown."""
    lines = ["| fault | what it does | seen on | case | verdict | caught by | twin |", "|---|---|---|---|---|---|---|"]
    for trial in trials:
        named = ", ".join(f"`{name}`" for name in trial.caught_by)
        on = trial.fault.seen_on if trial.fault.needs is None else "neither"
        by = named if trial.outcome == "caught" else f"**{trial.outcome.replace('MISSED', 'missed')}**"
        lines.append(
            f"| `{trial.fault.name}` | {trial.fault.summary} | {on} | `{trial.case}` | {trial.verdict} | {by} | {trial.twin} |"
        )
    return "\n".join(lines)
