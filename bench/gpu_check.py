"""Run the product once on a GPU machine, as a user would: `make gpu-check`.

The suite with a case of each engine, predictions against what was just measured, and every command. CI has no GPU, so what only
breaks on one breaks unseen there. Prints a table; exit code 1 if a check failed, 0 on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from hpc_core.cli.console import say
from hpc_core.record.environment import machine, visible_gpus
from hpc_core.record.record import Record, record_from_json

LIMIT_S = 300.0
_TAIL_LINES = 12
_PEAK_RATIO = 0.0005
"""The tolerance of a predicted peak, as the gate's for bytes."""

CASES = (
    "llama-3.2-3b/generate-fp16",
    "llama-3.2-3b/generate-bf16-static",
    "llama-3.2-3b/generate-nf4-graph",
    "llama-3.2-3b/lora",
    "llama-3.2-3b/qlora-gc",
    "llama-3.2-3b/lora-tuned",
)
"""Stock generation, transformers' compiled forward, the graph engine, stock fine-tuning and the tuned engine."""
PREDICTED = ("llama-3.2-3b/lora", "llama-3.2-3b/generate-fp16")


@dataclass(frozen=True)
class Check:
    """A command, and what makes it right."""

    name: str
    command: tuple[str, ...]
    codes: tuple[int, ...] = (0,)
    """Exit codes that are right."""
    output: Path | None = None
    """Where standard output goes, if not to the log."""
    also: Callable[[], str | None] = lambda: None
    """Return what is wrong beyond the exit code, or None."""


def checks(out: Path) -> Iterator[Check]:
    """Yield the checks in order; later ones read what earlier ones wrote into `out`."""
    python, gpu = sys.executable, machine("cuda").name
    records = out / "records"
    lora = records / "llama-3.2-3b" / "lora.json"
    baselines = out / "baselines"

    def pytest(*arguments: str) -> tuple[str, ...]:
        return (python, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark", *arguments)

    def command(*arguments: str) -> tuple[str, ...]:
        return (python, "-m", "hpc_core.cli", *arguments)

    named = [part for case in CASES for part in ("--perf-case", case)]
    yield Check("doctor", command("doctor"), codes=(0, 1))  # 1: something optional is missing
    yield Check("cases", command("cases"))
    # 10: a case has no baseline on this machine, or its time is undecided. 1 and 11 are what this check is for.
    yield Check("suite: each engine", pytest("--perf-strict", f"--perf-records={records}", *named), codes=(0, 10))
    yield Check(
        "suite: a step of one's own",
        pytest("bench/test_instruments.py", "-k", "known_bytes or known_launches"),
    )
    for case in PREDICTED:
        predicted = out / f"predicted-{case.rpartition('/')[2]}.json"
        yield Check(
            f"predict {case}",
            command("predict", case, "--gpu", gpu, "--json"),
            codes=(0, 1),  # 1: it does not fit this GPU
            output=predicted,
            also=lambda case=case, predicted=predicted: _peaks_differ(predicted, records / f"{case}.json"),  # type: ignore[misc]
        )
    yield Check("run", command("run", "llama-3.2-3b/generate-bf16-graph", "--launch", "exec"))
    yield Check("profile", command("profile", "tiny/lora", "--out", str(out / "profile")))
    yield Check(
        "report",
        command("report", str(records), "--markdown", str(out / "report.md"), "--csv", str(out / "metrics.csv")),
    )
    stored = ("--baselines", str(baselines))
    yield Check(
        "baseline accept", command("baseline", "accept", str(lora), *stored, "--reason", "gpu-check", "--allow-dirty")
    )
    yield Check("baseline list", command("baseline", "list", *stored))
    yield Check("baseline show", command("baseline", "show", "llama-3.2-3b/lora", *stored))
    yield Check("baseline diff", command("baseline", "diff", str(lora), *stored))
    yield Check("explain", command("explain", str(lora), *stored))
    yield Check("history", command("history", "llama-3.2-3b/lora", *stored))
    yield Check("prediction-table", command("prediction-table", "--only", "llama-3.2-3b/lora", "--gpu", gpu, *stored))
    yield Check("faults", command("faults", "--only", "logits-kept"))
    sides = ("--base-python", python, "--head-python", python)
    yield Check("ab", command("ab", *sides, "--case", "tiny/lora", "--exact"))
    now = version("transformers")
    # Nothing differs between a version and itself, so there is nothing to find: a refusal in one line.
    same = ("--package", "transformers", "--versions", f"{now},{now}", "--python-for", f"{now}={python}")
    yield Check("bisect", command("bisect", "tiny/lora", "peak_bytes", *same), codes=(2,))


def _peaks_differ(predicted: Path, measured: Path) -> str | None:
    new, old = _record(predicted), _record(measured)
    if new is None or old is None:
        return "a record is missing"
    ours, theirs = (float(each.metrics["peak_bytes"].value) for each in (new, old))
    ratio = ours / theirs - 1
    return (
        None if abs(ratio) <= _PEAK_RATIO else f"peak_bytes {ours:,.0f} predicted, {theirs:,.0f} measured: {ratio:+.3%}"
    )


def _record(path: Path) -> Record | None:
    return record_from_json(path.read_bytes()) if path.is_file() else None


def run(check: Check, log: Path) -> tuple[str, float]:
    """Run a check; return "ok" or what is wrong, and the seconds it took. Its output goes to `log`."""
    start = time.monotonic()
    try:
        with log.open("wb") as errors, (check.output or log).open("ab") as output:
            done = subprocess.run(check.command, stdout=output, stderr=errors, timeout=LIMIT_S, check=False)
        wrong = check.also() if done.returncode in check.codes else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        wrong = f"it took longer than {LIMIT_S:g} s"
    return wrong or "ok", time.monotonic() - start


def main() -> int:
    """Run every check and print the table."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder for records and logs")
    out = parser.parse_args().out
    if not visible_gpus():
        say("gpu-check: no CUDA GPU is visible, so there is nothing to check here")
        return 0
    say(f"gpu-check on {machine('cuda').name}; logs in {out}")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    failed, total_s = 0, 0.0
    for number, check in enumerate(checks(out), start=1):
        log = out / "logs" / f"{number:02}-{check.name.replace(' ', '-').replace('/', '-').replace(':', '')}.log"
        outcome, seconds = run(check, log)
        total_s += seconds
        say(f"{check.name:<36} {seconds:6.1f} s  {outcome}")
        sys.stdout.flush()
        if outcome != "ok":
            failed += 1
            say(f"    {shlex.join(check.command)}")
            say("\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]))
    say(f"{'in all':<36} {total_s:6.1f} s  {f'{failed} FAILED' if failed else 'ok'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
