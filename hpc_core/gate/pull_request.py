"""Judge a record of a pull request: by the baseline of its merge base, and by the one that the pull request brings.

Changing a baseline is no free pass: the change is judged too.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hpc_core.baselines.baseline import Baseline, Lookup
from hpc_core.case.limits import Limits
from hpc_core.gate.loosened import is_looser
from hpc_core.gate.verdict import Excuse, Judgement, MetricVerdict, Verdict, gravest_first, worst, worst_metric
from hpc_core.record import units as sizes

_FAILING = (Verdict.REGRESSED, Verdict.INVALID)
_DECIDED = (Verdict.PASS, Verdict.IMPROVED, Verdict.REGRESSED)


class Side(msgspec.Struct, frozen=True):
    """A baseline, or what lies in its place, and the plain judgement of the record against it."""

    lookup: Lookup
    judgement: Judgement


def limits_beside(base: Lookup, head: Lookup) -> tuple[tuple[Limits, ...], tuple[Limits, ...]]:
    """Return the limits that hold beside those of the code: against the merge base's baseline, and against the pull request's.

    A baseline stores the limits that its case was accepted with, so those of the merge base are known. Looser ones in the code
    have no effect. A pull request that accepts its case anew brings an absolute limit of its own, as it brings a value; but what
    it accepts must be what was measured, so the percentage at the merge base holds there, too. A new case has only the code's.
    """
    if not isinstance(base, Baseline):
        return (), ()
    old = base.spec.limits
    if not isinstance(head, Baseline):
        return (old,), (old,)
    # A metric that the pull request drops needs no limit any more.
    relative = {name: each for name, each in old.named().items() if isinstance(each, str) and name in head.metrics}
    return (old,), (Limits(**relative), head.spec.limits)


def judge_pull_request(base_side: Side, head_side: Side) -> Judgement:
    """Return the verdict on a record against the merge base's baseline, given the baseline of the pull request.

    Where the pull request leaves the baseline alone, this is the judgement against the merge base's. Where it changes it:

    - REGRESSED against the merge base stays REGRESSED. It is excused if the pull request accepts what was just measured:
      its baseline holds another value than the merge base's, and the record passes against that. A record that is better
      than what the pull request accepts is not excused, or a baseline could be raised further than the code needs. If
      whether it passes cannot be decided, neither can this: INCONCLUSIVE.
    - What fails against the pull request's own baseline fails: it would fail on the next run after the merge.
    - A baseline that the pull request makes worse than what this run gives is INVALID, though no metric is worse.
    - What the merge base cannot judge (a new case, a changed case, a new metric, another driver) is judged by the
      pull request's baseline.
    """
    base, against_base = base_side.lookup, base_side.judgement
    head, against_head = head_side.lookup, head_side.judgement
    untouched = base == head or (not isinstance(base, Baseline) and type(base) is type(head))
    if untouched or not against_base.metrics:  # a run that failed or is invalid has none
        return against_base
    if not isinstance(base, Baseline) or all(row.verdict not in _DECIDED for row in against_base.metrics):
        return _with_remark(against_head, head, against_base)
    here = {row.metric: row for row in against_head.metrics}
    # Held by the merge base, absent from the record and from the pull request's baseline: dropped on purpose.
    dropped = [row.metric for row in against_base.metrics if row.metric not in here and isinstance(head, Baseline)]
    judged = [
        _row(row, here.pop(row.metric, None), base, head) for row in against_base.metrics if row.metric not in dropped
    ]
    rows = [row for row, _ in judged] + list(here.values())
    rows.sort(key=gravest_first)
    verdict = worst_metric(rows)
    if not isinstance(head, Baseline) and against_head.verdict in _FAILING:
        verdict = worst((verdict, against_head.verdict))
    model = against_base if against_base.verdict is verdict else _in_words(against_head, rows, verdict)
    excuses = tuple(excuse for _, excuse in judged if excuse is not None)
    remarks = against_head.remarks
    if dropped:
        remarks = (f"dropped by this pull request: {', '.join(dropped)}", *remarks)
    return msgspec.structs.replace(model, verdict=verdict, metrics=tuple(rows), excuses=excuses, remarks=remarks)


def _row(
    was: MetricVerdict, now: MetricVerdict | None, base: Baseline, head: Lookup
) -> tuple[MetricVerdict, Excuse | None]:
    """Return which of the two verdicts on a metric counts, and what excuses it."""
    if now is None:
        return was, None
    if was.verdict is Verdict.REGRESSED:
        return _regressed(was, now, base, head)
    if now.verdict in _FAILING:
        return msgspec.structs.replace(now, reason=f"Against the baseline of this pull request: {now.reason}"), None
    if not isinstance(head, Baseline):
        return was, None
    old, new = base.metrics.get(was.metric), head.metrics.get(was.metric)
    if now.verdict is Verdict.IMPROVED and old is not None and new is not None and is_looser(old, new):
        return _loosened(now), None
    return (was if was.verdict in _DECIDED else now), None


def _loosened(row: MetricVerdict) -> MetricVerdict:
    why = "This pull request accepts a worse value than this run gives, which would hide the next regression"
    step = f"Accept what it gives, or restore the baseline. {row.next_step}".strip()
    return msgspec.structs.replace(row, verdict=Verdict.INVALID, reason=f"{why}: {row.reason}", next_step=step)


def _regressed(
    was: MetricVerdict, now: MetricVerdict, base: Baseline, head: Lookup
) -> tuple[MetricVerdict, Excuse | None]:
    old = base.metrics.get(was.metric)
    new = head.metrics.get(was.metric) if isinstance(head, Baseline) else None
    if not isinstance(head, Baseline) or old is None or new is None or old == new:
        return was, None
    moved = f"{was.metric} {sizes.pair(old.value, new.value, new.unit)}"
    if now.verdict is Verdict.INCONCLUSIVE:
        claim = f"REGRESSED against the merge base; this pull request accepts {moved}, and whether this run gives that"
        return msgspec.structs.replace(now, reason=f"{claim} is undecided: {now.reason}"), None
    if now.verdict is Verdict.PASS:
        return was, Excuse(
            metric=was.metric, text=f"accepted in this pull request: {moved}, reason: {head.accepted.reason}"
        )
    claim = f"This pull request accepts {moved}, but that is not what this run gives: {now.reason}"
    return msgspec.structs.replace(was, reason=f"{was.reason} {claim}"), None


def _with_remark(judgement: Judgement, head: Lookup, against_base: Judgement) -> Judgement:
    why = head.accepted.reason if isinstance(head, Baseline) else "no sound baseline"
    remark = (
        f"judged by the baseline of this pull request ({why}), as the merge base has none to compare with: "
        f"{against_base.headline}"
    )
    return msgspec.structs.replace(judgement, remarks=(*judgement.remarks, remark))


def _in_words(against_head: Judgement, rows: Sequence[MetricVerdict], verdict: Verdict) -> Judgement:
    """Return the pull request's judgement as the case's, with the deciding metric in the headline."""
    leading = next((row for row in rows if row.judged and row.verdict is verdict), None)
    where = "(against the baseline of this pull request)"
    headline, reason, step = (
        f"{against_head.headline} {where}",
        f"{against_head.reason} {where}",
        against_head.next_step,
    )
    if leading is not None and against_head.verdict is not verdict:
        size = "" if leading.change is None else f" {sizes.change(leading.change, leading.unit)}"
        headline, reason, step = f"{leading.metric}{size} {where}", leading.reason, leading.next_step
    return msgspec.structs.replace(against_head, headline=headline, reason=reason, next_step=step)
