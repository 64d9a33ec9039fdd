"""The engine `tuned`: the trainer whose step follows the switches of the case, with its facts and counters."""

from __future__ import annotations

from typing import Any

import torch

from hpc_core.builders.assemble import Built
from hpc_core.case.case import Case
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.engines.finetune import TrainingEngine, fed_case, finetune_program, unpredictable_switch
from hpc_core.engines.tuned.compile import compiled_layers
from hpc_core.engines.tuned.forward import TunedForward, restore
from hpc_core.engines.tuned.liger import seen_of_liger
from hpc_core.engines.tuned.program import TunedProgram
from hpc_core.record.findings import Findings, checked
from hpc_core.record.metrics import metric
from hpc_core.record.record import Fact

_WITHIN = 0.01
"""Relative. Losses of the same weights and batch differ only by the order of sums, and a replay does not change that."""


class TunedEngine(TrainingEngine):
    """Fused functions, a chunked loss, a memory budget, and a step in one CUDA graph; each has a switch in the case."""

    name = "tuned"
    own_code = True

    def unpredictable(self, case: Case) -> str | None:
        """Return why the case cannot be predicted: a compiler or a CUDA graph changes the step. A chunked loss is predicted."""
        workload = case.workload
        assert isinstance(workload, FinetuneSpec)
        switches = {
            "graph": (workload.graph, "the private pool of a CUDA graph"),
            "compile": (workload.compile != "off", "what torch.compile keeps and launches"),
            "fusion": (workload.fusion != "off", "the fused functions' kernels"),
            "loss": (workload.loss == "liger", "what Liger's kernels take"),
        }
        for name, (on, what) in switches.items():
            if on:
                return unpredictable_switch(case.id, name, getattr(workload, name), what)
        return fed_case(case)

    def load(self, case: Case, device: torch.device, built: Built | None) -> TunedTraining:
        """Put the tuned forward into the model.

        Raises:
            DataError, BuildError, MissingLibraryError: as `finetune_program`, or the switches do not support the model or budget.
        """
        assert built is not None
        assert isinstance(case.workload, FinetuneSpec)
        program = finetune_program(built, case, case.workload, TunedTraining)
        assert isinstance(program, TunedTraining)
        program.prepare(case.workload)
        program.draws_dropout = case.adapter is not None and case.adapter.dropout > 0
        return program

    def restore(self, model: torch.nn.Module) -> None:
        """Remove the tuned forward."""
        restore(model)


class TunedTraining(TunedProgram):
    """The trainer's program, with its own facts and counters."""

    draws_dropout = False
    """True if dropout makes two steps on the same batch differ."""

    @property
    def recomputed_attentions(self) -> int | None:
        """The number of layers whose attention is recomputed, by the plan of the memory budget."""
        return None if self.plan is None else self.plan.attentions

    def counters(self, found: Findings) -> Findings:
        """Return `peak_bytes` of a captured step: that of capture and replay, including the graph's private pool."""
        if self.captured is None:
            return Findings()
        pool, _ = self.captured.pool_bytes()
        watched = int(found.metrics["peak_bytes"].value)
        note = f"capture and replay with the graph's pool of {pool:,} bytes; the same step without a graph {watched:,}"
        return Findings(
            metrics={
                "peak_bytes": metric("peak_bytes", self.captured.peak_bytes(), on_gpu=True, note=note),
                "graph_pool_bytes": metric("graph_pool_bytes", pool, on_gpu=True, gated=False),
            }
        )

    def facts(self, found: Findings | None = None) -> Findings:
        """Return a fact per switch, from what was called and captured so far; after a measurement, also of budget and replay."""
        switches = self._switches()
        if found is None:
            return switches
        facts = {}
        budget = self.workload.budget_bytes
        if budget is not None:
            peak = int(found.metrics["peak_bytes"].value)
            asked = f"at most {budget:,} bytes"
            facts["budget"] = Fact(asked=asked, seen=asked if peak <= budget else f"{peak:,} bytes")
        if self.captured is not None and not self.draws_dropout:
            facts["graph_step"] = self._replay_against_plain()
        return switches | Findings(facts=facts)

    def _replay_against_plain(self) -> Fact:
        """Compare the loss of a replayed step with that of a forward without a graph, on the same weights and batch."""
        self.steps_done = self.widest
        batch = self.batches[self.widest]
        # With a graph of autograd, as in the step: without one, compiled layers would compile again.
        plain = float(self.model(input_ids=batch.ids, labels=batch.labels, attention_mask=batch.mask).loss.detach())
        self.step()
        replayed = float("nan") if self.loss is None else float(self.loss)
        asked = "the loss of the same step without a graph"
        near = abs(replayed - plain) <= _WITHIN * abs(plain)
        return Fact(asked=asked, seen=asked if near else f"{replayed:.6g}, without a graph {plain:.6g}")

    def _switches(self) -> Findings:
        """Return a fact per switch; a switch that fell back has the reason. A note says how many halves are recomputed."""
        workload, called = self.workload, self.run.called
        causal: Any = self.forward.causal
        layers = list(self.forward.decoder.layers)
        notes = []
        if self.plan is not None:
            again = f"{self.plan.attentions} attentions and {self.plan.mlps} MLPs of {len(layers)} are computed again"
            notes.append(f"budget: {again}, expected peak {self.plan.peak_bytes:,} bytes")
        if workload.fusion == "blocks" and not self.run.compiled:
            notes.append("fusion: the kernels between the products run as plain torch on this device")

        def loss() -> str:
            if called.get("liger_loss"):
                return "liger"
            return "chunked" if called["logits_into_gradient"] else "stock"

        def compiled() -> str:
            count = compiled_layers(layers)
            return {0: "off", len(layers): "layers"}.get(count, f"{count} of {len(layers)} layers")

        def update() -> Fact:
            ways = ("after the backward", "in the backward")
            return Fact(asked=ways[workload.optimizer_in_backward], seen=ways[bool(called["adamw"])])

        tuned = isinstance(vars(causal).get("forward"), TunedForward)
        graph = self.fallen.get("graph", "off") if self.captured is None else "on"
        return Findings(notes=tuple(notes)) | checked(
            {
                "engine": lambda: Fact(asked=workload.engine, seen="tuned" if tuned else "stock"),
                "engine_loss": lambda: Fact(asked=workload.loss, seen=loss()),
                "engine_fusion": lambda: Fact(asked=workload.fusion, seen=self._fusion(layers)),
                "engine_compile": lambda: Fact(asked=workload.compile, seen=compiled()),
                "engine_update": update,
                "engine_graph": lambda: Fact(asked="on" if workload.graph else "off", seen=graph),
            }
        )

    def _fusion(self, layers: list[Any]) -> str:
        called, halves = self.run.called, self.forward.halves
        if halves:
            own = [half for half in halves if vars(half.module).get("forward") is half]
            whole = len(own) == 2 * len(layers) and called["norm"] and called["swiglu_backward"]
            return "blocks" if whole else f"{len(own)} halves of {2 * len(layers)}"
        by_liger = seen_of_liger(self.forward.decoder, called)
        if by_liger is not None:
            return by_liger
        patched = sum("forward" in vars(module) for layer in layers for module in layer.modules())
        return "linears" if patched else "off"
