"""Which halves of decoder layers are computed again in the backward, so that a step stays within a budget of memory.

Not saving a half's activations takes its forward once more, without the last product, whose output nobody needs. All layers are alike, so a
plan is two numbers: how many attentions and how many MLPs. The cheapest pair that fits is taken; there are (layers + 1)² of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpc_core.case.errors import BuildError

__all__ = ["HalfCost", "Plan", "Sizes", "plan_for"]

_GIB = 1024**3


@dataclass(frozen=True)
class HalfCost:
    """One half of a layer: bytes that it saves for the backward beside its input, and nominal seconds of computing them again."""

    saved_bytes: int
    again_s: float


@dataclass(frozen=True)
class Sizes:
    """What a step holds beside what the halves save: `fixed_bytes` while the loss is made, `end_bytes` after the backward."""

    layers: int
    fixed_bytes: int
    end_bytes: int
    attention: HalfCost
    mlp: HalfCost


@dataclass(frozen=True)
class Plan:
    """How many attentions and MLPs are computed again, and the peak that this should give."""

    attentions: int
    mlps: int
    peak_bytes: int


def plan_for(sizes: Sizes, budget_bytes: int) -> Plan:
    """The plan of least time whose peak is at most the budget.

    The first layers are computed again, the last in the backward: what the others saved is gone by then. So one half computed again
    counts only where nothing else is saved.

    Raises:
        BuildError: even computing every half again needs more; the message has the numbers.
    """
    plans = [
        Plan(attentions, mlps, _peak(sizes, attentions, mlps))
        for attentions in range(sizes.layers + 1)
        for mlps in range(sizes.layers + 1)
    ]
    fitting = [plan for plan in plans if plan.peak_bytes <= budget_bytes]
    if not fitting:
        least = min(plan.peak_bytes for plan in plans)
        raise BuildError(
            f"A budget of {budget_bytes / _GIB:.3f} GiB is too small: with every layer computed again the step still needs {least / _GIB:.3f} GiB, "
            f"{sizes.fixed_bytes / _GIB:.3f} GiB of it for weights, optimizer, layer inputs and loss. Raise budget_bytes, or take a smaller batch, "
            "length, loss_chunk or quantized weights."
        )
    return min(fitting, key=lambda plan: (_seconds(sizes, plan), plan.peak_bytes))


def _seconds(sizes: Sizes, plan: Plan) -> float:
    return plan.attentions * sizes.attention.again_s + plan.mlps * sizes.mlp.again_s


def _peak(sizes: Sizes, attentions: int, mlps: int) -> int:
    saved = (sizes.layers - attentions) * sizes.attention.saved_bytes + (sizes.layers - mlps) * sizes.mlp.saved_bytes
    once = max(
        sizes.attention.saved_bytes if attentions else 0,
        sizes.mlp.saved_bytes if mlps else 0,
    )
    return max(sizes.fixed_bytes + max(saved, once), sizes.end_bytes)
