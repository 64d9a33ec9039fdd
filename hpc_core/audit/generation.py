"""Facts of a generation: the KV cache in use and its length, evaluation mode, no graph, tokens of prompt and answer."""

from __future__ import annotations

import torch

from hpc_core.audit.facts import taken
from hpc_core.audit.forwards import ForwardsSeen
from hpc_core.case.case import GenerateSpec
from hpc_core.engines.generate import GenerateProgram
from hpc_core.record.record import Fact

__all__ = ["generation_facts"]


def generation_facts(
    workload: GenerateSpec, program: GenerateProgram, seen: ForwardsSeen, notes: list[str], *, new_tokens: int
) -> dict[str, Fact]:
    """Facts of one watched query: the first prompt and `new_tokens` tokens after it."""
    if not seen.calls:
        notes.append("audit: generate never called the model itself, so its cache and mode could not be seen")
        return taken({"prompt_tokens": lambda: _prompt_tokens(workload, program)}, notes)
    width = len(program.prompts[0].ids[0])
    return taken(
        {
            "cache": lambda: Fact(asked=workload.cache, seen=_cache_kind(seen)),
            # The last token is handed out and never fed back.
            "cache_length": lambda: _cache_length(workload, seen, width + new_tokens - 1),
            "forwards": lambda: Fact(asked=new_tokens, seen=seen.calls),
            "training_mode": lambda: Fact(asked="off", seen=_mode(seen)),
            "autograd": lambda: Fact(asked="off", seen="on" if seen.graph else "off"),
            "autocast": lambda: Fact(asked=["off"], seen=sorted(seen.autocast)),
            "prompt_tokens": lambda: _prompt_tokens(workload, program),
            "prefill": lambda: Fact(asked=[workload.batch, width], seen=list(seen.first["input_ids"].shape)),
        },
        notes,
    )


def _cache_kind(seen: ForwardsSeen) -> str:
    if seen.cache is None:
        return "off"
    name = type(seen.cache).__name__
    return {"DynamicCache": "dynamic", "StaticCache": "static"}.get(name, name)


def _cache_length(workload: GenerateSpec, seen: ForwardsSeen, asked: int) -> Fact | None:
    if workload.cache == "off" or seen.cache is None:
        return None
    return Fact(asked=asked, seen=int(seen.cache.get_seq_length()))


def _mode(seen: ForwardsSeen) -> str:
    return f"on in {seen.training} of {seen.modules} modules" if seen.training else "off"


def _prompt_tokens(workload: GenerateSpec, program: GenerateProgram) -> Fact:
    """Unpadded tokens of all prompts: in closed form for random ones, by the data otherwise; seen in the masks on the device."""
    asked = sum(prompt.tokens for prompt in program.prompts)
    if workload.data.source == "random":
        assert workload.prompt_length is not None
        asked = workload.batch * workload.prompt_length * workload.prompts
    masks = [inputs["attention_mask"] for inputs in program.inputs]
    return Fact(asked=asked, seen=int(torch.stack([mask.sum() for mask in masks]).sum()))
