"""The catalogue of injected faults, and how they are tried. `hpc-core faults` tries all of them."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hpc_core.baselines.accept import unstored
from hpc_core.baselines.baseline import Baseline, Damaged
from hpc_core.baselines.lookup import find
from hpc_core.case.errors import SpecError
from hpc_core.catalogue import catalogue
from hpc_core.cli import main
from hpc_core.cli.fault_causes import TABLE_FILE, cause_table, explained, explained_faults
from hpc_core.cli.fault_trials import Trial, _Bench, markdown, run_trials, summary, trial_cases
from hpc_core.faults import host
from hpc_core.faults.catalogue import FAULTS, inject
from hpc_core.faults.fault import Fault, Injection, target
from hpc_core.faults.host import HELD_BACK
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Verdict
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Job
from hpc_core.record.record import Record
from tests.commands import exit_code
from tests.strategies import a_case, a_record, busy, counted, failed_record, peak

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BASELINES = ROOT / "baselines"
TINY = trial_cases("tiny")


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    """One forkserver for all tests."""
    with Launcher("warm") as warm:
        yield warm


@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_every_fault_has_a_case(scale: str) -> None:
    """There are at least forty faults, and each has a case at both scales."""
    assert len(FAULTS) >= 40
    assert {fault.variant for fault in FAULTS.values()} <= set(trial_cases(scale))  # type: ignore[arg-type]


def test_only_one_fault_needs_an_ab() -> None:
    """On a GPU a sleep of a tenth of a step needs an A/B; what only wall time shows needs an idle machine."""
    needs = {fault.name: fault.needs for fault in FAULTS.values() if fault.needs}
    assert [name for name, need in needs.items() if need == "A/B"] == ["host-delay"]
    assert set(needs.values()) == {"A/B", "--jobs 1"}
    for name in needs:
        assert any(each.endswith("_s") for each in FAULTS[name].shows_in), name
    assert {fault.seen_on for fault in FAULTS.values()} <= {"cpu", "gpu", "both"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faults_target_exists(name: str) -> None:
    """A fault whose target was moved or renamed fails here, before it is injected."""
    owner, attribute, is_key = target(FAULTS[name].patch)
    assert callable(owner[attribute] if is_key else getattr(owner, attribute))


def test_a_no_op_calls_the_original_and_counts() -> None:
    """An inactive fault calls the original; both forms count the calls."""
    for active, result in ((True, 17), (False, 4)):
        injection = Injection(FAULTS["rank-16"], active=active)
        call = injection.fault.replacement(lambda r: r + 1, injection)
        assert (call(r=3), injection.hits) == (result, 1)


def test_half_of_the_twenty_host_faults_are_held_back() -> None:
    """Ten of the faults of the host were written after the rules that must catch them."""
    source = inspect.getsource(host)
    of_host = [name for name in FAULTS if f'    "{name}",\n    "' in source]
    assert len(of_host) == 20
    assert set(HELD_BACK) < set(of_host)
    assert len(HELD_BACK) == 10


def test_an_unknown_fault_names_the_known_ones() -> None:
    """An unknown name is refused with the list of faults."""
    with pytest.raises(SpecError, match=r"No fault is called 'gc-of'(.|\n)*gc-off"):
        inject("gc-of")


def test_a_fault_is_caught_and_its_no_op_passes() -> None:
    """One fault fails the audit, another a count, and their no-ops pass. `make faults` tries all of them."""
    lines: list[str] = []
    names = ["compute-dtype-fp32", "extra-kernel"]

    trials = run_trials(names, cases=TINY, baselines=BASELINES, tell=lines.append)

    assert "compute_dtype" in trials[0].caught_by
    assert "operators" in trials[1].caught_by
    assert all(trial.twin == "PASS" for trial in trials)
    assert [line.split()[:2] for line in lines] == [["caught", name] for name in names]


@pytest.mark.nightly
def test_a_clean_run_replaces_a_baseline(tmp_path: Path) -> None:
    """Without a baseline, a fault is judged by a clean run, its no-op passes, and one slow call into C is not judged beside another worker."""
    lines: list[str] = []

    trials = run_trials(
        ["extra-kernel", "weights-hashed"], cases=TINY, against="clean", baselines=tmp_path, jobs=2, tell=lines.append
    )

    assert [(trial.verdict, trial.twin, trial.outcome) for trial in trials] == [
        ("REGRESSED", "PASS", "caught"),
        ("PASS", "PASS", "needs --jobs 1"),
    ]
    assert "not judged here" in trials[1].shown or "was measured" in trials[1].shown  # on a busy machine
    assert len(lines) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_failed_clean_run_judges_nothing(launcher: Launcher) -> None:
    """If the case itself does not run, no no-op passes, and the reason is given."""
    bench = _Bench(launcher, BASELINES, alone=True)
    broken = trial_cases("full")["lora"]  # needs a GPU

    lookup, _ = bench.run_clean(broken)

    if isinstance(lookup, Damaged):  # on a machine without a GPU
        assert "needs a CUDA GPU" in lookup.reason
        assert "the clean run of llama-3.2-3b/lora-4-layers" in judge(a_record(case=broken), lookup).reason


@pytest.mark.nightly
def test_the_cause_names_category_and_module(launcher: Launcher, tmp_path: Path) -> None:
    """The cause of a real fault names what grew and in which module, and every record and the table are written."""
    names = ["extra-kernel", "embeddings-fp32", "extra-clone", "optimizer-32bit"]

    explanations = explained_faults(names, launcher, cases=TINY, tell=lambda _: None, out=tmp_path)

    assert {each.fault: each.missing for each in explanations} == dict.fromkeys(names, ())
    causes = {each.fault: each.cause.lines[0] for each in explanations if each.cause is not None}
    assert causes["extra-kernel"].startswith("operators +3")
    assert "add +3 in LlamaMLP (layers.*.mlp, 3 layers)" in causes["extra-kernel"]
    assert "(held float32[1024, 128], in place of bfloat16[1024, 128])" in causes["embeddings-fp32"]
    assert "in place of uint8" in causes["optimizer-32bit"]
    assert cause_table(explanations).count("| yes |") == len(names)
    assert (tmp_path / TABLE_FILE).read_text() == f"{cause_table(explanations)}\n"
    records = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")}
    assert records == {"tiny/lora.json", "tiny/lora-8bit.json", "tiny/lora-8bit+optimizer-32bit.json"} | {
        f"tiny/lora+{name}.json" for name in names[:3]
    }


def test_no_fault_is_tried_on_a_case_that_breaks_without_one() -> None:
    """Where the clean run breaks, its faults do not run, and the table gives the reason for each."""
    broken = _FixedLauncher(failed_record())
    explanations = explained_faults(["extra-kernel", "extra-clone"], broken, cases=TINY, tell=lambda _: None)  # type: ignore[arg-type]
    assert broken.runs == 1
    assert cause_table(explanations).count("the clean run broke") == 2


def test_a_missing_cause_is_reported() -> None:
    """Where nothing differs or the run broke, the table has that instead of a cause, and the fault does not count as explained."""
    same = a_record({"peak_bytes": peak(), "operators": counted()})

    silent, broken = explained("extra-kernel", same, same), explained("extra-kernel", same, failed_record())

    assert (silent.good, broken.good) == (False, False)
    assert "no: `add`, `LlamaMLP`" in cause_table([silent])
    assert "the run with the fault broke" in cause_table([broken])


class _FixedLauncher:
    """Returns the same record for every job, in place of a launcher."""

    def __init__(self, record: Record):
        self._record, self.runs = record, 0

    def run(self, _: Job) -> Record:
        self.runs += 1
        return self._record


@pytest.mark.parametrize(("alone", "verdict"), [(True, Verdict.REGRESSED), (False, Verdict.PASS)])
def test_workers_that_share_a_device_are_not_judged_by_time(
    alone: bool, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the busy time is a regression of a worker alone, and not judged where others run at the same time."""
    before = a_record({"peak_bytes": peak(), "operators": counted(), "busy_s": busy(0.25)})
    slow = a_record({"peak_bytes": peak(), "operators": counted(), "busy_s": busy(0.5)})
    bench = _Bench(_FixedLauncher(slow), BASELINES, alone=alone)  # type: ignore[arg-type]
    monkeypatch.setattr(bench, "_accepted", lambda *_: (unstored(before, reason="a test"), {}))

    assert bench._judged(a_case(), "extra-kernel")[1].verdict is verdict


def test_an_unstored_baseline_is_refused_like_a_stored_one() -> None:
    """A good record becomes a baseline without a file, and a failed one does not."""
    assert isinstance(unstored(a_record(), reason="a test"), Baseline)
    bench = _Bench(_FixedLauncher(failed_record()), BASELINES, alone=True)  # type: ignore[arg-type]
    assert isinstance(bench.run_clean(a_case())[0], Damaged)


def test_a_fault_does_not_leak_into_the_next_case(launcher: Launcher) -> None:
    """After a patched case, the same case without the patch passes in the same session."""
    case = catalogue()["tiny/lora"]
    launcher.run(Job(case=case, fault="extra-kernel"))

    clean = launcher.run(Job(case=case))

    assert judge(clean, find(BASELINES, "cpu", case.id)).verdict is Verdict.PASS


def test_a_fault_that_never_runs_is_invalid(launcher: Launcher) -> None:
    """A case that does not reach the patched code is INVALID."""
    record = launcher.run(Job(case=catalogue()["tiny/generate-bf16"], fault="gc-off"))

    assert record.status == "invalid"
    assert "proves nothing here" in record.reasons[-1]


def _trial(name: str, *, red: tuple[str, ...] = (), twin: str = "PASS", fault: Fault | None = None) -> Trial:
    verdict = "INVALID" if red else "PASS"
    return Trial(fault=fault or FAULTS[name], case="tiny/lora", red=red, verdict=verdict, twin=twin)


def test_missed_faults_and_false_alarms_are_named() -> None:
    """The summary names missed faults and counts no-ops that failed; the table marks the missed ones."""
    caught = _trial("rank-16", red=("trainable_parameters",))
    passed = _trial("gc-on")
    alarm = _trial("rank-16", red=("trainable_parameters",), twin="REGRESSED: x")

    assert summary([caught], 2.0) == "1 of 1 faults caught, twins green, 2 s"
    text = summary([caught, passed, alarm], 2.0)
    assert text == "1 of 3 faults caught, 1 of 3 twins not green, 2 s\nMISSED: gc-on, rank-16"
    assert "**missed**" in markdown([passed])


def test_a_fault_that_is_not_judged_here_never_counts_as_caught() -> None:
    """A fault that needs more counts neither as caught nor as missed, but as missed if it turns another metric red."""
    waiting = _trial("decode-sleep")
    unexpected = _trial("decode-sleep", red=("operators",))

    assert summary([waiting], 2.0).splitlines() == [
        "0 of 0 faults caught, twins green, 2 s",
        "Not judged here: decode-sleep needs --jobs 1",
    ]
    assert "| **needs --jobs 1** |" in markdown([waiting])
    assert (waiting.good, unexpected.good, unexpected.outcome) == (True, False, "MISSED")
    assert not _trial("decode-sleep", twin="REGRESSED: x").good


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "unheard-of"], "No fault is called 'unheard-of'"),
        (["--scale", "full", "--against", "baselines"], "have no baselines"),
    ],
    ids=["unknown", "no-baselines"],
)
def test_a_mistake_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake is refused before anything runs."""
    assert exit_code(main, "faults", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.nightly
def test_ctrl_c_ends_all_workers() -> None:
    """Interrupted while two workers run, the command ends within seconds and leaves no process."""
    command = ["-m", "hpc_core.cli", "faults", "--only", "*growing*", "--jobs", "2", "--against", "clean"]
    program = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    processes: set[psutil.Process] = set()
    deadline = time.monotonic() + 60
    while len(processes) < 5 and time.monotonic() < deadline:  # forkserver, two supervisors, two workers
        processes |= set(psutil.Process(program.pid).children(recursive=True))
        time.sleep(0.05)
    assert len(processes) >= 5
    os.kill(program.pid, signal.SIGINT)

    program.communicate(timeout=40)

    assert program.returncode != 0
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
