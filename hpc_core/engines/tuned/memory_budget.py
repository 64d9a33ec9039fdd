"""Which halves of decoder layers are computed again in the backward, so that a step stays within a memory budget.

Not saving a half's activations costs its forward once more, without the last product, whose output is not needed. All layers are alike, so a
plan is two numbers: how many attentions and how many MLPs. The cheapest pair that fits is taken, of (layers + 1)² pairs. What a half saves is
measured on one layer, the rest is counted; on a GPU the second step corrects the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hpc_core.case.errors import BuildError
from hpc_core.engines.tuned.fused import Half
from hpc_core.instruments.owners import optimizer_tensors, owned_bytes, weight_tensors

_GIB = 1024**3


@dataclass(frozen=True)
class HalfCost:
    """One half of a layer: bytes that it saves for the backward besides its input, and nominal seconds to compute them again."""

    saved_bytes: int
    again_s: float


@dataclass(frozen=True)
class Sizes:
    """What a step holds besides what the halves save: `fixed_bytes` during the loss, `end_bytes` after the backward."""

    layers: int
    fixed_bytes: int
    end_bytes: int
    attention: HalfCost
    mlp: HalfCost


@dataclass(frozen=True)
class Plan:
    """How many attentions and MLPs are computed again, and the expected peak."""

    attentions: int
    mlps: int
    peak_bytes: int


def plan_for(sizes: Sizes, budget_bytes: int) -> Plan:
    """Return the fastest plan whose peak is at most the budget.

    The first layers are computed again, which come last in the backward, when what the others saved is already freed. So one half that is
    computed again counts only if nothing else is saved.

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


_WIDE_LOGITS = 4
"""Float32 copies of a chunk's logits, where no fused kernel avoids them."""
_WIDE_GATES = 5
"""Float32 copies of a gate in its backward, where no fused kernel avoids them."""
_WIDE_UPDATE = 8
"""Float32 copies of a weight in AdamW's update inside the backward, where no fused kernel avoids them."""
_HIDDEN_HELD = 5
"""Copies of the hidden states around last norm and loss: embedded, to be added, sum, normed, gradient."""
_WORKSPACE_BYTES = 64 * 2**20
"""What cuBLAS keeps on a GPU."""
_GRAPH_SHARE = 0.02
"""Share of a graph's pool that may be lost between blocks; a replay uses the whole pool. On an H100 at 3B, LoRA lost 1.6 %, and QLoRA, whose layers
allocate and free whole weights, 6 %. If more is lost, that shows after the capture, and a tighter plan is captured."""


_FLOPS_PER_S, _BYTES_PER_S = 989e12, 3.35e12
"""Dense bfloat16 and memory of an H100 SXM (NVIDIA H100 data sheet). Only their ratio matters for a plan. They are the same on every
GPU, so that plans, and with them bytes and kernels, do not depend on the machine."""


def fit(program: Any, budget_bytes: int, *, expected: Plan | None = None, lost_bytes: int | None = None) -> Plan:
    """Choose the plan for this budget and put it into the program's halves.

    `expected`: the plan of a step that has just run on a GPU, whose peak corrects what is counted. `lost_bytes`: what a graph's pool takes
    beyond what its work needs; a share of the pool until that is known.

    Raises:
        BuildError: the budget is too small.
    """
    sizes = sizes_of(program)
    if expected is not None:
        measured = int(torch.cuda.max_memory_allocated(program.batches[0].ids.device))
        program.miscounted_bytes = measured - expected.peak_bytes
    sizes = replace(sizes, fixed_bytes=sizes.fixed_bytes + program.miscounted_bytes)
    if lost_bytes is None:
        held, _, moments = _held(program)
        lost_bytes = int(_GRAPH_SHARE * max(0, budget_bytes - held - moments)) if program.workload.graph else 0
    plan = plan_for(sizes, budget_bytes - lost_bytes)
    left = {"attention": plan.attentions, "mlp": plan.mlps}
    for half in program.forward.halves:  # from the first layer on
        half.again = left[half.name] > 0
        left[half.name] -= 1
    return plan


def sizes_of(program: Any) -> Sizes:
    """Return what a step of this program holds, measured and counted on its widest batch."""
    forward, batch = program.forward, program.batches[program.widest]
    rows, item = batch.ids.numel(), forward.causal.lm_head.weight.element_size()
    config = forward.causal.config
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    halves: list[Half] = forward.halves
    layers = len(halves) // 2
    held, trained, moments = _held(program)
    streams = 2 * layers * rows * hidden * item
    chunk = min(rows, program.workload.loss_chunk) * int(config.vocab_size)
    wide = 0 if program.run.compiled else 4
    losing = chunk * (item + wide * _WIDE_LOGITS)
    head = forward.causal.lm_head.weight
    if head.requires_grad:
        losing += head.numel() * item
    # The last MLP's backward: gradients of gate and up, and a weight dequantized.
    dense = hidden * inner if forward.causal.model.layers[0].mlp.gate_proj.weight.element_size() < item else 0
    turning = item * (2 * rows * inner + dense) + wide * _WIDE_GATES * rows * inner
    around = rows * hidden * item * _HIDDEN_HELD
    saved = [_saved_bytes(program, half) for half in halves[:2]]
    again_s = _again_s(forward, rows, batch.ids.shape[1], item)
    fixed = held + moments + streams + around + max(losing, turning)
    if batch.ids.is_cuda:
        fixed += _WORKSPACE_BYTES
    twice_head = 2 * head.numel() * item if head.requires_grad else 0
    updating = wide * _WIDE_UPDATE * _largest_trained(program) if program.workload.optimizer_in_backward else 0
    return Sizes(
        layers=layers,
        fixed_bytes=fixed,
        end_bytes=held + moments + trained + twice_head + updating,
        attention=HalfCost(saved[0], again_s[0]),
        mlp=HalfCost(saved[1], again_s[1]),
    )


def _held(program: Any) -> tuple[int, int, int]:
    """Return bytes of weights and batches, of gradients at the end of the backward, and of the optimizer's state."""
    owned = sum(owned_bytes(tensors) for tensors in weight_tensors(program.model).values())
    batches = program.batches.held_bytes()
    trained = sum(part.nbytes for part in program.model.parameters() if part.requires_grad)
    gradients = 0 if program.workload.optimizer_in_backward else trained
    return owned + batches, gradients, owned_bytes(optimizer_tensors(program.optimizer)) or 2 * trained


def _largest_trained(program: Any) -> int:
    return max(int(part.numel()) for part in program.model.parameters() if part.requires_grad)


def _saved_bytes(program: Any, half: Half) -> int:
    """Return the bytes that autograd saves in one call of this half on the widest batch, besides its input and what the model owns."""
    forward, batch = program.forward, program.batches[program.widest]
    head = forward.causal.lm_head.weight
    stream = head.new_zeros((batch.ids.numel(), int(forward.causal.config.hidden_size))).requires_grad_()
    cos, sin = (
        each[0].unsqueeze(1) for each in forward._angles_of(stream.detach().view(*batch.ids.shape, stream.shape[-1]))
    )
    # By the storage itself: a fake tensor has no address.
    known = {part.untyped_storage()._cdata for part in (*program.model.parameters(), stream, cos, sin)}
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> None:
        saved.append(tensor)  # and nothing is packed: an output that its own function held would never be freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
        output = half.inside(stream, None, cos, sin)
    found = owned_bytes(each for each in saved if each.untyped_storage()._cdata not in known)
    saved.clear()  # the hook holds the list, the list its tensors, these their functions, and those the hook
    del output
    return found


def _again_s(forward: Any, rows: int, length: int, item: int) -> tuple[float, float]:
    """Return nominal seconds of each half's forward without its last product, whose output no backward needs: its FLOPs and its bytes, one after the other.

    FLOPs alone underestimate attention: its products are small, and norm, adapters and rotation only move memory.
    """
    layer = forward.decoder.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    heads, gates = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    hidden = int(mlp.gate_proj.in_features)
    queries, keys = (int(module.out_features) for module in heads[:2])
    normed = 2 * hidden  # read and written
    turned = 2 * (queries + keys)
    mixed = 2 * (queries + keys)  # queries, keys and values read, the mixture written
    flops = sum(_product_flops(each, rows) for each in heads) + 4 * rows * length * queries
    moved = sum(_product_bytes(each, rows, item) for each in heads) + rows * item * (normed + turned + mixed)
    mlp_flops = sum(_product_flops(each, rows) for each in gates)
    mlp_moved = sum(_product_bytes(each, rows, item) for each in gates) + rows * item * normed
    return flops / _FLOPS_PER_S + moved / _BYTES_PER_S, mlp_flops / _FLOPS_PER_S + mlp_moved / _BYTES_PER_S


def _product_flops(module: Any, rows: int) -> int:
    return 2 * rows * int(module.in_features) * int(module.out_features)


def _product_bytes(module: Any, rows: int, item: int) -> int:
    """Return the bytes that a linear layer reads and writes: weights (4-bit ones are written out and read again), activations, and an adapter's two thin products."""
    inner, outer = int(module.in_features), int(module.out_features)
    weight = module.get_base_layer().weight if hasattr(module, "get_base_layer") else module.weight
    dense = inner * outer * item
    weights = dense if weight.numel() == inner * outer else weight.nbytes + 2 * dense
    adapter = rows * item * (inner + 2 * outer) if hasattr(module, "lora_A") else 0
    return int(weights + rows * item * (inner + outer) + adapter)
