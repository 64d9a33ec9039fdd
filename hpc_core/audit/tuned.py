"""Facts of the tuned training engine: each switch as asked, and as the live model and what it called show it."""

from __future__ import annotations

from typing import Any

from hpc_core.audit.facts import taken
from hpc_core.engines.tuned.compile import compiled_layers
from hpc_core.engines.tuned.forward import TunedForward
from hpc_core.engines.tuned.liger import seen_of_liger
from hpc_core.engines.tuned.program import TunedProgram
from hpc_core.record.record import Fact

__all__ = ["tuned_facts"]


def tuned_facts(program: TunedProgram, notes: list[str]) -> dict[str, Fact]:
    """One fact a switch; a switch that fell back shows why. Where halves are computed again, a note says how many."""
    workload, called = program.workload, program.run.called
    causal: Any = program.forward.causal
    layers = list(program.forward.decoder.layers)
    if program.plan is not None:
        plan = program.plan
        notes.append(
            f"budget: {plan.attentions} attentions and {plan.mlps} MLPs of {len(layers)} are computed again, expected peak {plan.peak_bytes:,} bytes"
        )
    if workload.fusion == "blocks" and not program.run.compiled:
        notes.append("fusion: the kernels between the products run as plain torch on this device")

    def fusion() -> str:
        if program.forward.halves:
            halves = [half for half in program.forward.halves if vars(half.module).get("forward") is half]
            whole = len(halves) == 2 * len(layers) and called["norm"] and called["swiglu_backward"]
            return "blocks" if whole else f"{len(halves)} halves of {2 * len(layers)}"
        by_liger = seen_of_liger(program.forward.decoder, called)
        if by_liger is not None:
            return by_liger
        patched = sum("forward" in vars(module) for layer in layers for module in layer.modules())
        return "linears" if patched else "off"

    def loss() -> str:
        if called.get("liger_loss"):
            return "liger"
        return "chunked" if called["logits_into_gradient"] else "stock"

    def compiled() -> str:
        count = compiled_layers(layers)
        return {0: "off", len(layers): "layers"}.get(count, f"{count} of {len(layers)} layers")

    tuned = isinstance(vars(causal).get("forward"), TunedForward)
    return taken(
        {
            "engine": lambda: Fact(asked=workload.engine, seen="tuned" if tuned else "stock"),
            "engine_loss": lambda: Fact(asked=workload.loss, seen=loss()),
            "engine_fusion": lambda: Fact(asked=workload.fusion, seen=fusion()),
            "engine_compile": lambda: Fact(asked=workload.compile, seen=compiled()),
            "engine_update": lambda: Fact(
                asked="in the backward" if workload.optimizer_in_backward else "after the backward",
                seen="in the backward" if called["adamw"] else "after the backward",
            ),
            "engine_graph": lambda: Fact(asked="on" if workload.graph else "off", seen=_graph(program)),
        },
        notes,
    )


def _graph(program: TunedProgram) -> str:
    return program.fallen.get("graph", "off") if program.captured is None else "on"
