"""Run the product once on a GPU machine, as a user would: `make gpu-check`.

The default suite, our engines, predictions against what was just measured, and every command. CI has no GPU, so what only
breaks on one breaks unseen there. Prints a table; exit code 1 if a check failed, 0 on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import repeat
from pathlib import Path

from hpc_core.case.errors import SpecError
from hpc_core.cli.console import say
from hpc_core.record.environment import machine, visible_gpus
from hpc_core.record.record import record_from_json

LIMIT_S = 600.0
"""When a check hangs. How long each took is in the table."""
_TAIL_LINES = 12
_PEAK_RATIO = 0.0005
"""The tolerance of a predicted peak, as the gate's for bytes."""
_TOGETHER = 8
"""Checks that run at a time where no time is measured."""

ON_REQUEST = ("llama-3.2-3b/generate-nf4-graph", "llama-3.2-3b/lora-tuned", "test_instruments/test_known_bytes_*")
"""What the default suite leaves out: our engines, and a step of known bytes."""
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


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark", *arguments)


def _command(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "hpc_core.cli", *arguments)


def in_order(out: Path) -> list[Check]:
    """Return the checks that run one after the other: they time the GPU, or read what an earlier check wrote into `out`."""
    keep = f"--perf-records={out / 'records'}"
    named = [part for case in ON_REQUEST for part in ("--perf-case", case)]
    lora, stored = str(out / "records" / "llama-3.2-3b" / "lora.json"), ("--baselines", str(out / "baselines"))
    # 10: a case has no baseline on this machine, or its time is undecided.
    return [
        Check("doctor", _command("doctor"), codes=(0, 1)),  # 1: something optional is missing
        Check("the default suite", _pytest("--perf-strict", keep), codes=(0, 10)),
        Check(
            "our engines, a step of one's own",
            _pytest("--perf-strict", "--perf-processes=1", keep, *named),
            codes=(0, 10),
        ),
        Check(
            "baseline accept", _command("baseline", "accept", lora, *stored, "--reason", "gpu-check", "--allow-dirty")
        ),
        Check("baseline list", _command("baseline", "list", *stored)),
        Check("baseline show", _command("baseline", "show", "llama-3.2-3b/lora", *stored)),
        Check("baseline diff", _command("baseline", "diff", lora, *stored)),
        Check("history", _command("history", "llama-3.2-3b/lora", *stored)),
    ]


def together(out: Path) -> list[Check]:
    """Return the checks that judge no time and may run together: predictions, tiny cases, and commands that read records."""
    python, gpu, now = sys.executable, machine("cuda").name, version("transformers")
    records = out / "records"
    sides = ("--base-python", python, "--head-python", python)
    # A bisection between a version and itself is refused in one line.
    same = ("--package", "transformers", "--versions", f"{now},{now}", "--python-for", f"{now}={python}")
    files = ("--markdown", str(out / "report.md"), "--csv", str(out / "metrics.csv"))
    return [
        *(_prediction(case, gpu, out) for case in PREDICTED),
        Check("profile", _command("profile", "llama-3.2-3b/lora", "--out", str(out / "profile"))),
        Check("ab", _command("ab", *sides, "--case", "tiny/lora", "--exact")),
        Check("run", _command("run", "tiny/generate-bf16")),
        # Against a clean run: the committed baselines of tiny cases are of another stack.
        Check("faults", _command("faults", "--only", "logits-kept", "--against", "clean")),
        Check("prediction-table", _command("prediction-table", "--only", "llama-3.2-3b/lora", "--gpu", gpu)),
        Check("report", _command("report", str(records), *files)),
        Check("explain", _command("explain", str(records / "llama-3.2-3b" / "lora.json"))),
        Check("cases", _command("cases")),
        Check("bisect", _command("bisect", "tiny/lora", "peak_bytes", *same), codes=(2,)),
    ]


def _prediction(case: str, gpu: str, out: Path) -> Check:
    predicted, record = out / f"predicted-{case.rpartition('/')[2]}.json", out / "records" / f"{case}.json"
    return Check(
        f"predict {case}",
        _command("predict", case, "--gpu", gpu, "--json"),
        codes=(0, 1),  # 1: it does not fit this GPU
        output=predicted,
        also=lambda: _peaks_differ(predicted, record),
    )


def _peaks_differ(predicted: Path, measured: Path) -> str | None:
    try:
        new, old = (record_from_json(path.read_bytes()) for path in (predicted, measured))
    except (OSError, SpecError) as error:
        return str(error)
    ours, theirs = (float(each.metrics["peak_bytes"].value) for each in (new, old))
    ratio = ours / theirs - 1
    return (
        None if abs(ratio) <= _PEAK_RATIO else f"peak_bytes {ours:,.0f} predicted, {theirs:,.0f} measured: {ratio:+.3%}"
    )


def run(check: Check, logs: Path) -> tuple[Check, str, float]:
    """Run a check; return it, "ok" or what is wrong, and the seconds it took. Its output goes to a file in `logs`."""
    log, start = _log(check, logs), time.monotonic()
    try:
        with log.open("ab") as errors, (check.output or log).open("ab") as output:
            done = subprocess.run(check.command, stdout=output, stderr=errors, timeout=LIMIT_S, check=False)
        wrong = check.also() if done.returncode in check.codes else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        wrong = f"it took longer than {LIMIT_S:g} s"
    return check, wrong or "ok", time.monotonic() - start


def _log(check: Check, logs: Path) -> Path:
    return logs / f"{re.sub(r'[^a-z0-9.]+', '-', check.name.lower())}.log"


def main() -> int:
    """Run every check and print the table."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder for records and logs")
    out: Path = parser.parse_args().out
    if not visible_gpus():
        say("gpu-check: no CUDA GPU is visible, so there is nothing to check here")
        return 0
    shutil.rmtree(out, ignore_errors=True)
    logs = out / "logs"
    logs.mkdir(parents=True)
    say(f"gpu-check on one {machine('cuda').name}; logs in {logs}")
    start, failed = time.monotonic(), 0
    for check in in_order(out):
        failed += _report(*run(check, logs), logs)
    with ThreadPoolExecutor(_TOGETHER) as workers:
        for result in workers.map(run, together(out), repeat(logs)):
            failed += _report(*result, logs)
    say(f"{'in all':<36} {time.monotonic() - start:6.1f} s  {f'{failed} FAILED' if failed else 'ok'}")
    return int(failed > 0)


def _report(check: Check, outcome: str, seconds: float, logs: Path) -> bool:
    """Print a row, and the command and the end of the log of a failed check; return whether it failed."""
    say(f"{check.name:<36} {seconds:6.1f} s  {outcome}")
    if outcome != "ok":
        tail = _log(check, logs).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        say("\n".join(f"    {line}" for line in [shlex.join(check.command), *tail]))
    sys.stdout.flush()
    return outcome != "ok"


if __name__ == "__main__":
    sys.exit(main())
