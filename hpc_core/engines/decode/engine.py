"""The engine `graph`: the decoder that replays one CUDA graph per token, with its facts and counters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from hpc_core.builders.assemble import Built
from hpc_core.case.case import Case
from hpc_core.case.workloads import GenerateSpec
from hpc_core.engines.capture import make_workspace
from hpc_core.engines.decode.program import GraphProgram
from hpc_core.engines.generate import GenerationEngine, prompts_for
from hpc_core.instruments.counters import attention_families
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric
from hpc_core.record.record import Fact


class GraphEngine(GenerationEngine):
    """A static cache, one captured step per token, and no synchronization between tokens; eager without CUDA."""

    name = "graph"
    own_code = True

    def unpredictable(self, case: Case) -> str | None:
        """Return why the case cannot be predicted: it runs its own kernels in a CUDA graph."""
        return (
            f"{case.id}: engine='graph' runs kernels of its own inside a CUDA graph, which cannot be predicted. Predict it "
            "with engine='stock', whose weights and cache a token are the same."
        )

    def load(self, case: Case, device: torch.device, built: Built | None) -> DecodeProgram:
        """Allocate the cache and capture the step on a GPU, before any query.

        Raises:
            DataError: the data has fewer prompts than asked for.
            SpecError: a model that the engine does not know.
            MissingLibraryError: kernels='triton' without triton.
        """
        assert built is not None
        assert isinstance(case.workload, GenerateSpec)
        program = DecodeProgram(built, case.workload, prompts_for(built, case.workload), case.seed)
        program.merged_adapter = case.adapter is not None
        return program


class DecodeProgram(GraphProgram):
    """The decoder's program, with its own facts and counters."""

    merged_adapter = False
    """True if the case has an adapter, which must be merged into the weights."""

    @contextlib.contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Run first tokens without their graph, so that every allocation of a prefill is recorded."""
        self.watched = True
        if self.captured is not None:
            # Captures free workspaces. Make one now: it is not an activation, and has no category, as in any other case.
            make_workspace(self.device)
        try:
            yield
        finally:
            self.watched = False

    def counters(self, found: Findings) -> Findings:
        """Return the seconds of first use, the memory of the graphs, and the block sizes chosen for this device."""
        seconds = {f"first_use_{part}_s": value for part, value in self.first_use_s.items()}
        metrics = {name: metric(name, value, note="once a process") for name, value in seconds.items()}
        notes: list[str] = []
        if self.captured is not None:
            pools = {"graph": self.captured.hidden_bytes, "first_token": self.first_tokens.hidden_bytes}
            for name, of in (("graph", "a captured token"), ("first_token", "captured prefills")):
                note = f"of {of}; the larger of two is part of every peak"
                metrics[f"{name}_pool_bytes"] = metric(f"{name}_pool_bytes", pools[name], on_gpu=True, note=note)
            if self.first_tokens.why_not:
                notes.append(f"engine: prefills run without a graph: {self.first_tokens.why_not}")
        if self.why_eager is not None:
            notes.append(f"engine: {self.why_eager}")
        notes += [f"engine: {name} runs with {text} each" for name, text in self.chosen_blocks.items()]
        return Findings(metrics=metrics, notes=tuple(notes))

    def facts(self, found: Findings | None = None) -> Findings:
        """Return whether the step is captured, its kernels and its head; after a counted query, also that query's facts.

        Without CUDA nothing can be captured and torch's own operators are right; the record's notes say why.
        """
        on_gpu = self.device.type == "cuda"
        facts = {
            "engine": Fact(asked=self.workload.engine, seen="graph"),
            "captured": Fact(asked=on_gpu, seen=self.captured is not None),
            "kernels": Fact(asked=self.workload.kernels if on_gpu else "torch", seen=self.step_of.kernels),
            "head": Fact(asked=self.workload.head, seen=self.step_of.head),
        }
        if found is not None:
            facts |= self._query_facts(found, on_gpu=on_gpu)
        return Findings(facts=facts)

    def _query_facts(self, found: Findings, *, on_gpu: bool) -> dict[str, Fact]:
        """Return facts of the counted query, from the program and its counters on the device."""
        new_tokens: int = found.observed["new_tokens"]
        width = self.inputs[0]["input_ids"].shape[1]
        masks = [inputs["attention_mask"] for inputs in self.inputs]
        prefill = sorted(name for name in attention_families(found.observed["operators"]) if name != "eager")
        prompt_tokens = sum(prompt.tokens for prompt in self.prompts)
        facts = {
            # Long prompts keep a GPU busy without a graph, and many prompts get no graphs.
            "captured_prefill": Fact(
                asked=on_gpu and self.first_tokens.worth_capturing, seen=self.first_tokens.all_replayed
            ),
            "steps": Fact(asked=new_tokens - 1, seen=self.replays),
            # The last token is never fed back.
            "cache_length": Fact(asked=width + new_tokens - 1, seen=int(self.cache.filled)),
            "training_mode": Fact(asked="off", seen="on" if self.model.training else "off"),
            "prompt_tokens": Fact(asked=prompt_tokens, seen=int(sum(int(mask.sum()) for mask in masks))),
            # torch chooses the kernel of its fused attention: this fact shows the choice and always holds.
            "attention_kernel": Fact(asked=prefill, seen=prefill),
        }
        if self.merged_adapter:
            left = any(".lora_" in name for name, _ in self.model.named_parameters())
            facts["adapter"] = Fact(asked="merged", seen="beside its weights" if left else "merged")
        return facts
