"""A/A: the error rates that samples of machine starts show, and the command that takes the samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.studies.error_rates.__main__ import main
from bench.studies.error_rates.metric_rates import residuals
from bench.studies.error_rates.rates import binomial_bound, error_rates
from bench.studies.error_rates.run import _chosen
from bench.studies.error_rates.samples import Declared, Samples, Start, merged, samples_from_json, samples_to_json
from hpc_core.case.errors import SpecError
from hpc_core.catalogue import ALL, TINY, finetune, generate, lora, tiny
from hpc_core.gate.intervals import SPREADS, three_way
from hpc_core.gate.tolerance import BUSY_RATIOS
from hpc_core.gate.verdict import Verdict, share
from hpc_core.record.record import Metric, record_to_json
from tests.commands import exit_code
from tests.gate.judging import busy_interval
from tests.strategies import a_record, counted

ROOT = Path(__file__).parents[2]
DECLARED = {
    "busy_s": Declared("s", "busy", "lower"),
    "step_s": Declared("s", "wall", "lower"),
    "peak_bytes": Declared("bytes", "exact", "lower"),
    "kernels": Declared("1", "exact", "lower"),
}


def starts(count: int, *, between: float, within: float = 0.0005, kernels: int = 0) -> Samples:
    """Starts of four processes of two cases. The last process of each start launches `kernels` more."""
    random = np.random.default_rng(count)
    made = []
    for number in range(count):
        common = random.normal(0, between)
        cases = {
            f"tiny/{name}": {
                "busy_s": tuple((0.1 * np.exp(common + random.normal(0, within, 4))).tolist()),
                "step_s": tuple((0.2 * np.exp(random.normal(0, 0.1) + random.normal(0, 0.05, 4))).tolist()),
                "peak_bytes": (float(2**33),) * 4,
                "kernels": (1600.0, 1600.0, 1600.0, 1600.0 + kernels),
            }
            for name in ("a", "b")
        }
        made.append(
            Start(
                name=str(number), at=f"2026-11-{number + 1:02}", machine="h100", gpu_uuid=f"GPU-{number}", cases=cases
            )
        )
    return Samples(metrics=DECLARED, starts=tuple(made))


def busy_of(*seconds: float) -> Metric:
    """Busy time of one process per value."""
    return Metric(
        value=seconds[0],
        unit="s",
        noise="busy",
        better="lower",
        depends_on=("case", "stack", "machine"),
        samples=seconds,
    )


def test_the_binomial_bound_is_clopper_and_pearsons() -> None:
    """No alarm in n comparisons bounds the rate by 1 - 0.05^(1/n); alarms in all, or no comparison, bound nothing."""
    assert binomial_bound(0, 299) == pytest.approx(1 - 0.05 ** (1 / 299))
    assert binomial_bound(0, 299) < 0.01 < binomial_bound(0, 298)
    assert (binomial_bound(0, 0), binomial_bound(2, 2)) == (1.0, 1.0)
    assert binomial_bound(1, 10) == pytest.approx(0.394163, abs=1e-6)  # tables: 39.42 %


def test_similar_starts_give_no_alarm() -> None:
    """Similar starts give no alarm; an A/B detects less than 1.5 %, and stored baselines their tolerance or more."""
    rates = error_rates(starts(4, between=0.001), resamples=200)
    assert (rates.suite, rates.alarmed, rates.comparisons, rates.gpus, rates.tests) == (0.0, 0, 2, 4, 2)
    assert rates.bound == pytest.approx(1 - 0.05**0.5)
    for rate in (rate for rate in rates.rates if rate.metric == "busy_s"):
        assert rate.paired is not None
        assert rate.stored is not None
        assert (rate.paired.alarms, rate.stored.alarms) == (0.0, 0.0)
        assert 0.005 < rate.paired.detects < 0.015
        assert 0.02 < rate.stored.detects < 0.04
    for rate in (rate for rate in rates.rates if rate.noise == "exact"):
        assert rate.paired is not None
        assert (rate.paired.alarms, rate.within, rate.between) == (0.0, 0.0, 0.0)
        assert rate.paired.detects == pytest.approx({"peak_bytes": 0.0005, "kernels": 1 / 1600}[rate.metric])
    assert rates.suite_others["wall"]["pytest-benchmark median:5%"] > 0.3
    assert rates.suite_others["busy"]["pytest-benchmark median:5%"] == 0.0


def test_the_stated_detectable_change_is_detected() -> None:
    """The stated change is REGRESSED in 95 of 100 draws by the suite's own rule, and half of it rarely."""
    samples = starts(4, between=0.001)
    stated = next(rate for rate in error_rates(samples, resamples=300).rates if rate.metric == "busy_s").stored
    assert stated is not None
    random = np.random.default_rng(1)
    seconds = [np.asarray(start.cases["tiny/a"]["busy_s"]) for start in samples.starts]

    def regressed(change: float) -> int:
        count = 0
        for number in range(200):
            new, *old = (random.choice(seconds[(number + step) % 4], 3, replace=False).tolist() for step in range(4))
            interval = busy_interval([value * (1 + change) for value in new], old, SPREADS["train"], share(2))
            count += three_way(interval, BUSY_RATIOS["train"], "lower") is Verdict.REGRESSED
        return count

    assert regressed(stated.detects * 1.01) >= 180
    assert regressed(stated.detects / 2) <= 10


def test_residuals_spread_as_processes_do() -> None:
    """Residuals of two processes spread as processes do, although subtracting their mean halves the variance."""
    logs = np.random.default_rng(5).normal(0, 0.01, (2000, 2))
    drawn = residuals([tuple(pair) for pair in np.exp(logs).tolist()])
    assert np.std(drawn) == pytest.approx(0.01, rel=0.1)  # its own deviation is 1.6 %


def test_starts_that_differ_raise_the_alarm_rate() -> None:
    """Where starts differ far more than assumed, the rates show that the suite alarms more often than stated."""
    rates = error_rates(starts(4, between=0.06), resamples=200)
    assert rates.suite is not None
    assert rates.suite > 10 * rates.alpha


def test_an_exact_metric_that_varies_alarms() -> None:
    """A count that is higher in one process of four alarms in as many comparisons of two processes."""
    kernels = next(
        r for r in error_rates(starts(2, between=0.0, kernels=1), resamples=20).rates if r.metric == "kernels"
    )
    assert kernels.paired is not None
    assert kernels.paired.alarms == pytest.approx(6 * 2 / (8 * 7))
    assert kernels.within > 0


def test_a_start_measured_in_parts_is_one(tmp_path: Path) -> None:
    """Samples of one name and GPU are merged, those of another GPU are not, and JSON keeps them whole."""
    once = starts(1, between=0.0)
    twice = merged([once, samples_from_json(samples_to_json(once), "here")])
    assert len(twice.starts) == 1
    assert [len(values) for values in twice.starts[0].cases["tiny/a"].values()] == [8] * 4
    assert len(merged([once, starts(2, between=0.0)]).starts) == 2
    other = Samples(metrics=DECLARED | {"kernels": Declared("1", "exact", "same")}, starts=())
    with pytest.raises(SpecError, match="kernels in two ways"):
        merged([once, other])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "nowhere.json"], "nowhere.json: No such file"),
        (["--samples", "bad.json"], "bad.json: no A/A samples"),
        (["--samples", "zero.json"], "busy_s holds 0.0; a time is above 0"),
        (["--samples", "bad.json", "--out", "x.json"], "drop --case, --start, --records and --out"),
        (["--case", "tiny/lroa"], "Near: tiny/lora"),
        (["--case", "tiny/lora", "--out", "bad.json"], "bad.json: no A/A samples"),
        (["--records", "empty", "--out", "aa.json"], "--perf-records"),
    ],
    ids=lambda value: "-".join(value[1:]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Bad input gives exit code 2 and one line that names it, before anything runs or any file changes."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("bad.json").write_text("{}")
    good = samples_to_json(starts(1, between=0.0)).decode()
    value = json.loads(good)["starts"][0]["cases"]["tiny/a"]["busy_s"][0]
    Path("zero.json").write_text(good.replace(str(value), "0.0"))
    assert exit_code(main, *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert Path("bad.json").read_text() == "{}"
    assert not Path("aa.json").exists()


@pytest.mark.nightly
def test_two_processes_and_their_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command adds each round of processes to the file, and its table says what is exact and what needs another start."""
    monkeypatch.chdir(ROOT)
    own = tmp_path / "own.py"
    own.write_text(
        "from hpc_core import CallableSpec, Case\n"
        "CASES = [Case(id='own/quiet', scale='tiny', workload=CallableSpec(factory='tests.launch.launch_factories:quiet', steps=3))]\n"
    )
    out = tmp_path / "samples.json"
    assert exit_code(main, "--cases", own, "--case", "own/*", "--processes", "2", "--out", out, "--start", "one") == 0
    out_text = capsys.readouterr().out
    assert "own/quiet" in out_text
    assert "metrics were equal in every process" in out_text
    assert "need a second start" in out_text
    (start,) = samples_from_json(out.read_bytes(), "out").starts
    assert (start.name, start.gpu_uuid, len(start.cases["own/quiet"]["step_s"])) == ("one", "cpu", 2)
    assert exit_code(main, "--samples", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["starts"] == 1


def test_records_of_a_suite_run_are_the_samples_of_a_start(tmp_path: Path) -> None:
    """A folder of --perf-records is one start, with one sample per process of each busy metric."""
    timed = {"busy_s": busy_of(0.1, 0.101, 0.1005), "copies": counted(4, unit="1 per 10 steps")}
    decoded = {"busy_decode_token_s": busy_of(0.01, 0.0101), "copies": counted(7, unit="1 per prefill and 16 tokens")}
    for name, metrics in (("lora", timed), ("generate-bf16", decoded)):
        case = finetune(tiny, lora(), variant=name) if name == "lora" else generate(tiny, variant=name)
        path = tmp_path / "one" / f"{case.id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record_to_json(a_record(metrics, case=case)))
    out = tmp_path / "aa.json"
    assert exit_code(main, "--records", tmp_path / "one", "--out", out, "--start", "first") == 0
    (start,) = samples_from_json(out.read_bytes(), "out").starts
    assert start.name == "first"
    assert start.cases["tiny/lora"] == {"busy_s": (0.1, 0.101, 0.1005), "copies": (4,)}
    assert start.cases["tiny/generate-bf16"]["busy_decode_token_s"] == (0.01, 0.0101)


def test_by_default_an_aa_takes_the_tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --case an A/A takes the suite's tiny cases; other cases can be named."""
    monkeypatch.setattr("bench.studies.error_rates.run.visible_gpus", tuple)
    assert {case.id for case in _chosen([], None)} == {case.id for case in TINY}
    named = _chosen(["tiny/data-*"], None)
    assert named
    assert not {case.id for case in named} & {case.id for case in ALL}
