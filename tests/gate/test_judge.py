"""Each verdict of the gate by example, with the text that a reader gets."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hpc_core.baselines.baseline import Damaged, Missing, OlderSchema
from hpc_core.case.limits import GiB, Limits, MiB
from hpc_core.case.parts import AdapterSpec
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Judgement, MetricVerdict, Verdict
from hpc_core.record.metrics import metric
from hpc_core.record.record import Machine, Metric
from tests.gate.judging import CPU_BYTES, UPDATE, baseline
from tests.strategies import CPU, H100, STACK, a_case, a_record, around, busy, counted, failed_record, peak, wall


def host_peak(value: int) -> Metric:
    """Counted bytes, which depend on no machine and no allocator."""
    return peak(value, **CPU_BYTES)


def flops(value: int) -> Metric:
    return counted(value, unit="FLOP")


@pytest.fixture
def against() -> Any:
    """Judge a metric against its accepted value."""

    def judged(name: str, old: Metric, new: Metric, limits: Limits | None = None, **around_new: Any) -> Judgement:
        lookup = baseline(a_record({name: old}))
        return judge(a_record({name: new}, circumstances=around(**around_new)), lookup, limits)

    return judged


def only(judgement: Judgement) -> MetricVerdict:
    (row,) = judgement.metrics
    return row


def test_what_was_accepted_passes() -> None:
    """The accepted record itself passes in every gated metric, which wall time is not."""
    judgement = judge(a_record(), baseline(a_record()))
    assert judgement.verdict is Verdict.PASS
    assert [row.metric for row in judgement.metrics] == ["busy_s", "operators", "peak_bytes"]
    assert {row.verdict for row in judgement.metrics} == {Verdict.PASS}
    assert judgement.baseline_path == f"{H100.key}/tiny/lora.json"
    assert (judgement.moved, judgement.broken) == ((), False)


@pytest.mark.parametrize(
    ("name", "old", "new", "verdict", "headline"),
    [
        ("peak_bytes", peak(8 * GiB), peak(8 * GiB + 2018634629), "REGRESSED", "peak_bytes +1.88 GiB, limit +0.05 %"),
        ("peak_bytes", peak(GiB), peak(GiB + 2 * MiB), "PASS", "peak_bytes +2.00 MiB, limit +2.00 MiB"),
        ("peak_bytes", peak(GiB), peak(GiB + 2 * MiB + 1), "REGRESSED", "peak_bytes +2.00 MiB, limit +2.00 MiB"),
        ("peak_bytes", peak(GiB), peak(GiB - 3 * MiB), "IMPROVED", "peak_bytes -3.00 MiB, limit +2.00 MiB"),
        ("peak_bytes", host_peak(10**6), host_peak(10**6 + 500), "PASS", "peak_bytes +500 B, limit +0.05 %"),
        ("peak_bytes", host_peak(10**6), host_peak(10**6 + 501), "REGRESSED", "peak_bytes +501 B, limit +0.05 %"),
        ("operators", counted(1617), counted(1618), "REGRESSED", "operators +1, limit equal"),
        ("operators", counted(1617), counted(1616), "IMPROVED", "operators -1, limit equal"),
        ("flops", flops(10**12), flops(10**12 + 1), "REGRESSED", "flops +1 FLOP, limit equal"),
        ("copies", counted(0), counted(0), "PASS", "copies +0, limit equal"),
        ("copies", counted(0), counted(1), "REGRESSED", "copies +1, limit equal"),
        ("share", counted(5, better="higher"), counted(4, better="higher"), "REGRESSED", "share -1, limit equal"),
        ("share", counted(5, better="higher"), counted(6, better="higher"), "IMPROVED", "share +1, limit equal"),
        ("parts", counted(5, better="same"), counted(4, better="same"), "REGRESSED", "parts -1, limit equal"),
        ("busy_s", busy(0.2), busy(0.202), "PASS", "busy_s +2.00 ms, limit +2 %"),
        ("busy_s", busy(0.2), busy(0.208), "REGRESSED", "busy_s +8.00 ms, limit +2 %"),
        ("busy_s", busy(0.2), busy(0.194), "IMPROVED", "busy_s -6.00 ms, limit +2 %"),
        (
            "busy_prefill_s",
            busy(0.2),
            busy(0.206),
            "INCONCLUSIVE",
            "busy_prefill_s +6.00 ms, limit +3 %, undecided: it takes an A/B (hpc-core ab), since 12 more processes or 12 more sessions would not decide it",
        ),
        ("busy_decode_token_s", busy(0.2), busy(0.204), "PASS", "busy_decode_token_s +4.00 ms, limit +5 %"),
    ],
)
def test_compared(against: Any, name: str, old: Metric, new: Metric, verdict: str, headline: str) -> None:
    """Each noise class has its tolerance and each direction its sign; the headline shows both."""
    judgement = against(name, old, new)
    assert (judgement.verdict.value, judgement.headline) == (verdict, headline)
    assert only(judgement).change == new.value - old.value


@pytest.mark.parametrize(
    ("limits", "verdict", "limit"),
    [
        (Limits(peak_bytes="20%"), "PASS", "+20 %"),
        (Limits(peak_bytes="0.01%"), "REGRESSED", "+0.01 %"),
        (Limits(peak_bytes="0%"), "REGRESSED", "equal"),
        (Limits(peak_bytes=GiB), "REGRESSED", "at most 1.00 GiB"),
        (Limits(peak_bytes=2 * GiB), "PASS", "+2.00 MiB"),
    ],
)
def test_limits(against: Any, limits: Limits, verdict: str, limit: str) -> None:
    """A percentage replaces the default tolerance; a number is checked in addition."""
    row = only(against("peak_bytes", peak(GiB), peak(GiB + MiB), limits))
    assert (row.verdict.value, row.limit) == (verdict, limit)


def test_limits_come_from_the_case() -> None:
    """Without limits given, those of the record's case count."""
    case = a_case(limits=Limits(operators="1%"))
    lookup = baseline(a_record({"operators": counted(1000)}, case=case))
    assert judge(a_record({"operators": counted(1005)}, case=case), lookup).verdict is Verdict.PASS
    assert judge(a_record({"operators": counted(1005)}, case=case), lookup, Limits()).verdict is Verdict.REGRESSED


def test_an_absolute_limit_needs_no_baseline() -> None:
    """An exceeded limit is REGRESSED without a baseline; one that holds does not make the case pass."""
    record, missing = a_record({"peak_bytes": peak(2 * GiB), "operators": counted()}), Missing(path="p")
    exceeded = judge(record, missing, Limits(peak_bytes=GiB))
    assert (exceeded.verdict, exceeded.headline) == (Verdict.REGRESSED, "peak_bytes 2.00 GiB, limit at most 1.00 GiB")
    within = judge(a_record({"peak_bytes": peak(GiB)}), missing, Limits(peak_bytes=GiB))
    assert (within.verdict, only(within).verdict) == (Verdict.NO_BASELINE, Verdict.PASS)


@pytest.mark.parametrize(
    ("metrics", "fragment"),
    [
        ({"operators": counted()}, "limit on busy_s, but the record has no busy_s"),
        (
            {"operators": counted(), "busy_s": busy(gated=False)},
            "limit on busy_s, but busy_s is shown there but not gated",
        ),
    ],
)
def test_a_limit_on_what_was_not_measured(metrics: dict[str, Metric], fragment: str) -> None:
    """A limit on a metric that was not measured never passes, and the next step lists what can be limited."""
    judgement = judge(a_record(metrics), baseline(a_record(metrics)), Limits(busy_s=1.0))
    assert judgement.verdict is Verdict.INCOMPATIBLE
    assert fragment in judgement.headline
    assert judgement.next_step == "Drop the limit. What this case can limit: operators."


@pytest.mark.parametrize(
    ("machine", "limits", "reason", "step"),
    [
        (CPU, Limits(busy_s=0.06), "only a GPU has busy_s, and this ran on a CPU", "device='cuda'"),
        (CPU, Limits(kernels="1%"), "only a GPU has kernels, and this ran on a CPU", "device='cuda'"),
        (Machine(key="predicted", name="H100", memory_bytes=80 * GiB), Limits(busy_s=0.06), "a prediction has no times", "on a GPU"),
    ],
)  # fmt: skip
def test_a_limit_on_the_wrong_machine(machine: Machine, limits: Limits, reason: str, step: str) -> None:
    """A limit on a metric that the machine cannot have says where it belongs; other limits are judged as usual."""
    record = a_record({"peak_bytes": peak(GiB)}, circumstances=around(machine=machine))
    judgement = judge(record, Missing(path="p"), limits)
    assert judgement.verdict is Verdict.INCOMPATIBLE
    assert reason in judgement.reason
    assert step in judgement.next_step
    broken = judge(record, Missing(path="p"), Limits(**limits.named() | {"peak_bytes": GiB // 2}))
    assert (broken.verdict, broken.headline) == (Verdict.REGRESSED, "peak_bytes 1.00 GiB, limit at most 512.00 MiB")


def test_a_moved_stack_is_compared_and_suspected(against: Any) -> None:
    """An upgrade that costs memory is REGRESSED and named; one that costs nothing passes and is listed."""
    stack = STACK | {"transformers": "5.24.0"} | {"accelerate": "1.10"}
    moved = ("accelerate absent → 1.10", "transformers 5.23.0 → 5.24.0")
    worse = against("peak_bytes", peak(GiB), peak(2 * GiB), stack=stack)
    assert (worse.verdict, worse.moved) == (Verdict.REGRESSED, moved)
    assert "Moved since the baseline: accelerate absent → 1.10, transformers 5.23.0 → 5.24.0." in worse.reason
    assert against("operators", counted(), counted(), stack=stack).verdict is Verdict.PASS
    independent = counted(5, depends_on=("case",)), counted(6, depends_on=("case",))
    assert "Moved" not in against("trainable_parameters", *independent, stack=stack).reason


@pytest.mark.parametrize(
    "change", [{"driver": "590.2"}, {"cuda": "13.1"}, {"torch": "2.11.0+cu131"}, {"torch": "2.11.0"}]
)
def test_time_is_inconclusive_across_drivers(against: Any, change: dict[str, str]) -> None:
    """Time cannot be compared across driver or CUDA, better or worse; memory can."""
    for value in (0.1, 0.25, 9.0):
        judgement = against("busy_s", busy(0.25), busy(value), stack=STACK | change)
        assert judgement.verdict is Verdict.INCONCLUSIVE
        assert "time cannot be compared across" in judgement.headline
    assert against("peak_bytes", peak(), peak(), stack=STACK | change).verdict is Verdict.PASS
    assert against("busy_s", busy(), busy(), stack=STACK | {"torch": "2.12.0+cu130"}).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("name", "old", "new", "verdict", "fragment"),
    [
        ("busy_s", busy(0.0), busy(), "INVALID", "in the baseline, busy_s is 0 s, and zero proves nothing"),
        ("peak_bytes", peak(0), peak(), "INVALID", "in the baseline, peak_bytes is 0 bytes"),
        ("operators", counted(-1), counted(), "INVALID", "below zero"),
        ("busy_s", busy(), busy(0.0), "INVALID", "busy_s is 0 s"),
        ("operators", counted(), counted(unit="bytes"), "INCOMPATIBLE", "unit 1 → bytes"),
        ("operators", counted(), counted(better="same"), "INCOMPATIBLE", "better lower → same"),
        ("operators", counted(), counted(noise="busy"), "INCOMPATIBLE", "noise exact → busy"),
        ("operators", counted(), counted(depends_on=("case",)), "INCOMPATIBLE", "depends_on"),
    ],
)
def test_values_that_prove_nothing(name: str, old: Metric, new: Metric, verdict: str, fragment: str) -> None:
    """A zero or negative measurement is INVALID on either side, and another quantity INCOMPATIBLE."""
    lookup = baseline(a_record(), metrics={name: old})
    judgement = judge(a_record({name: new}), lookup)
    assert judgement.verdict.value == verdict
    assert fragment in judgement.headline


def test_a_vanished_metric_is_incompatible() -> None:
    """A gated metric that vanished or lost its gate is INCOMPATIBLE, even if another metric is new."""
    lookup = baseline(a_record({"operators": counted(), "kernels": counted()}))
    judgement = judge(a_record({"operators": counted(gated=False), "copies": counted(3)}), lookup)
    verdicts = {row.metric: row.verdict.value for row in judgement.metrics}
    assert verdicts == {"kernels": "INCOMPATIBLE", "operators": "INCOMPATIBLE", "copies": "NO_BASELINE"}
    assert "vanished" in judgement.headline


def test_runs_that_gave_nothing_to_judge() -> None:
    """An invalid record and a broken run are INVALID for their own reasons, whatever their numbers."""
    lookup = baseline(a_record())
    invalid = judge(a_record(status="invalid", reasons=("half the rows were padding.",)), lookup)
    assert (invalid.verdict, invalid.metrics, invalid.broken) == (Verdict.INVALID, (), False)
    assert invalid.headline == "invalid: half the rows were padding."
    broken = judge(failed_record(), lookup)
    assert (broken.verdict, broken.metrics, broken.broken) == (Verdict.INVALID, (), True)
    assert broken.headline == "out_of_memory in build: 80.1 GiB asked for, 79.6 GiB there."


def test_nothing_gated_never_passes() -> None:
    """A record without a gated metric never passes."""
    assert judge(a_record({"step_s": wall()}), Missing(path="p")).verdict is Verdict.NO_BASELINE


def test_the_worst_metric_leads() -> None:
    """The worst verdict decides, its largest change is named first, and the others are counted."""
    lookup = baseline(a_record({"kernels": counted(100), "operators": counted(100), "copies": counted(9)}))
    judgement = judge(a_record({"kernels": counted(101), "operators": counted(150), "copies": counted(8)}), lookup)
    assert judgement.headline == "operators +50, limit equal (and 1 more REGRESSED)"
    assert [row.metric for row in judgement.metrics] == ["operators", "kernels", "copies"]
    assert UPDATE in judgement.next_step


def test_outcomes() -> None:
    """The table of verdicts and test outcomes."""
    outcomes = {verdict.value: (verdict.outcome(), verdict.outcome(strict=True)) for verdict in Verdict}
    assert outcomes == {
        "PASS": ("passed", "passed"),
        "IMPROVED": ("passed", "passed"),
        "REGRESSED": ("failed", "failed"),
        "INVALID": ("failed", "failed"),
        "INCONCLUSIVE": ("skipped", "failed"),
        "NO_BASELINE": ("skipped", "failed"),
        "INCOMPATIBLE": ("skipped", "failed"),
    }


def test_a_new_metric_is_not_judged_and_hides_no_regression() -> None:
    """A new metric leaves the case's verdict as it is, says how to accept it, and is judged once accepted."""
    accepted = baseline(a_record({"peak_bytes": peak(GiB)}))
    new = Metric(value=0, unit="bytes", noise="exact", better="lower", **CPU_BYTES)
    good = judge(a_record({"peak_bytes": peak(GiB), "unexplained_bytes": new}), accepted)
    worse = judge(a_record({"peak_bytes": peak(2 * GiB), "unexplained_bytes": new}), accepted)
    assert (good.verdict, good.outcome(strict=True), worse.verdict) == (Verdict.PASS, "passed", Verdict.REGRESSED)
    for judgement in (good, worse):
        row = judgement.metrics[-1]
        assert (row.metric, row.verdict, row.judged) == ("unexplained_bytes", Verdict.NO_BASELINE, False)
        assert (row.reason, row.next_step) == (
            "unexplained_bytes is 0 B; it is new and not judged, since the baseline does not hold it yet.",
            f"To have it judged: {UPDATE}",
        )
        assert judgement.remarks == (f"new, not judged: unexplained_bytes. To have them judged: {UPDATE}",)
    more = msgspec.structs.replace(new, value=1)
    updated = baseline(a_record({"peak_bytes": peak(GiB), "unexplained_bytes": new}))
    assert judge(a_record({"peak_bytes": peak(GiB), "unexplained_bytes": more}), updated).verdict is Verdict.REGRESSED


def test_a_new_metric_keeps_an_absolute_limit() -> None:
    """A limit that needs no baseline is judged on a new metric as on any other."""
    accepted = baseline(a_record({"peak_bytes": peak(GiB)}))
    record = a_record({"peak_bytes": peak(GiB), "kernels": counted(7)})
    assert judge(record, accepted, Limits(kernels=6)).verdict is Verdict.REGRESSED
    assert judge(record, accepted, Limits(kernels=7)).verdict is Verdict.PASS
    assert judge(record, accepted, Limits(kernels="1%")).metrics[-1].judged is False


def test_an_accepted_zero_leaves_no_slack() -> None:
    """One byte more than an accepted zero is a regression, and zero itself passes."""
    none, one = (Metric(value=value, unit="bytes", noise="exact", better="lower", **CPU_BYTES) for value in (0, 1))
    accepted = baseline(a_record({"unexplained_bytes": none}))
    assert judge(a_record({"unexplained_bytes": none}), accepted).verdict is Verdict.PASS
    assert judge(a_record({"unexplained_bytes": one}), accepted).verdict is Verdict.REGRESSED


@pytest.mark.parametrize(
    ("lookup", "verdict", "fragments"),
    [
        (
            Missing(path="p", elsewhere=("cpu",)),
            "NO_BASELINE",
            ("no baseline of tiny/lora for nvidia", "one for cpu", UPDATE),
        ),
        (
            Damaged(path="p/q.json", reason="cut"),
            "INVALID",
            ("baseline damaged: cut", "git checkout -- p/q.json", UPDATE),
        ),
        (OlderSchema(path="p", found=0), "INCOMPATIBLE", ("older schema 0, this hpc-core reads 1", UPDATE)),
        (OlderSchema(path="p", found=7), "INCOMPATIBLE", ("newer schema 7", "Upgrade hpc-core")),
    ],
)
def test_a_missing_or_unreadable_baseline(lookup: Any, verdict: str, fragments: tuple[str, ...]) -> None:
    """A missing, damaged, older or newer baseline has its own verdict, text and next step."""
    judgement = judge(a_record(), lookup)
    assert {judgement.verdict.value, *(row.verdict.value for row in judgement.metrics)} == {verdict}
    assert len(judgement.metrics) == 3
    for fragment in fragments:
        assert fragment in f"{judgement.headline} {judgement.next_step}"


def test_a_changed_case_is_stale() -> None:
    """A baseline of another digest is STALE and names the fields that changed; id, limits and timeout do not count."""
    lookup = baseline(a_record())
    case = a_case(adapter=AdapterSpec(rank=16), seed=3, timeout_s=9, limits=Limits(operators="1%"))
    judgement = judge(a_record(case=case), lookup)
    assert judgement.verdict is Verdict.INCOMPATIBLE
    assert judgement.headline.startswith(
        "STALE: the case changed since this baseline (adapter.rank default → 16, seed default → 3)"
    )
    assert judge(a_record(case=a_case(timeout_s=9)), lookup).verdict is Verdict.PASS


def test_a_copied_baseline() -> None:
    """A baseline of another id is refused, even for the same work."""
    judgement = judge(a_record(case=a_case("tiny/other")), baseline(a_record()))
    assert judgement.verdict is Verdict.INCOMPATIBLE
    assert "the baseline is of tiny/lora, not of tiny/other" in judgement.headline


def test_a_foreign_machine() -> None:
    """A metric that depends on the machine is not compared with another machine's; others are."""
    record = a_record({"peak_bytes": peak(), "operators": counted()})
    judgement = judge(record, baseline(record, machine=CPU))
    assert [(row.metric, row.verdict.value) for row in judgement.metrics] == [
        ("peak_bytes", "INCOMPATIBLE"),
        ("operators", "PASS"),
    ]
    assert "the baseline is of cpu, this is nvidia-h100" in judgement.headline


def bytecodes(value: float = 100_000) -> dict[str, Metric]:
    """The host's bytecodes of a step."""
    return {"bytecodes": metric("bytecodes", value, on_gpu=True)}


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(98_999, Verdict.IMPROVED), (99_000, Verdict.PASS), (101_000, Verdict.PASS), (101_001, Verdict.REGRESSED)],
)
def test_what_the_host_executes_may_grow_by_one_percent(value: int, verdict: Verdict) -> None:
    """Bytecodes pass within 1 % of the accepted count; a limit of the case replaces that."""
    accepted = baseline(a_record(bytecodes()))
    assert judge(a_record(bytecodes(value)), accepted).verdict is verdict
    strict = a_case(limits=Limits(bytecodes="0.1%"))
    assert judge(a_record(bytecodes(100_101), case=strict), accepted).verdict is Verdict.REGRESSED


def test_a_few_lines_of_python_are_no_regression_of_a_small_step() -> None:
    """A step of a thousand bytecodes may gain 200, two lines or three; the text of the limit says so."""
    accepted = baseline(a_record(bytecodes(1_000)))
    good, worse = (judge(a_record(bytecodes(value)), accepted) for value in (1_200, 1_201))
    assert (good.verdict, worse.verdict) == (Verdict.PASS, Verdict.REGRESSED)
    assert worse.metrics[0].limit == "+200"


def test_another_python_leaves_the_hosts_counts_out_and_judges_the_rest() -> None:
    """Bytecodes of another minor version of Python cannot be compared: the case is judged by its other metrics, and says so."""
    accepted = baseline(a_record({"peak_bytes": peak(GiB)} | bytecodes()), python="3.12.3")
    good = judge(a_record({"peak_bytes": peak(GiB)} | bytecodes(200_000)), accepted)
    worse = judge(a_record({"peak_bytes": peak(2 * GiB)} | bytecodes()), accepted)
    assert (good.verdict, worse.verdict) == (Verdict.PASS, Verdict.REGRESSED)
    row = next(row for row in good.metrics if row.metric == "bytecodes")
    assert (row.verdict, row.judged) == (Verdict.INCOMPATIBLE, False)
    assert row.reason == "bytecodes depends on Python's minor version, which was 3.12 and is 3.11."
    assert good.remarks == (f"of another Python, not judged: bytecodes. To have them judged: {UPDATE}",)


def test_a_patch_release_of_python_changes_no_count() -> None:
    """Counts of 3.11.4 are compared with those of 3.11.9."""
    accepted = baseline(a_record(bytecodes()), python="3.11.4")
    assert judge(a_record(bytecodes(200_000)), accepted).verdict is Verdict.REGRESSED
