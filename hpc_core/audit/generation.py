"""Facts of a generation: KV cache, mode, autograd, tokens."""

from __future__ import annotations

import torch

from hpc_core.audit.forwards import Forwards
from hpc_core.case.workloads import GenerateSpec
from hpc_core.engines.generate import GenerateProgram
from hpc_core.record.findings import Findings, checked
from hpc_core.record.record import Fact


def generation_facts(
    workload: GenerateSpec, program: GenerateProgram, forwards: Forwards, *, new_tokens: int
) -> Findings:
    """Return the facts of one observed query: the first prompt, and `new_tokens` tokens generated from it."""
    if not forwards.calls:
        note = "audit: generate never called the model itself, so its cache and mode could not be seen"
        return Findings(notes=(note,)) | checked({"prompt_tokens": lambda: _prompt_tokens(workload, program)})
    width = len(program.prompts[0].ids[0])
    return checked(
        {
            "cache": lambda: Fact(asked=workload.cache, seen=_cache_kind(forwards)),
            # The last token is never fed back.
            "cache_length": lambda: _cache_length(workload, forwards, width + new_tokens - 1),
            "forwards": lambda: Fact(asked=new_tokens, seen=forwards.calls),
            "training_mode": lambda: Fact(asked="off", seen=_mode(forwards)),
            "autograd": lambda: Fact(asked="off", seen="on" if forwards.graph else "off"),
            "autocast": lambda: Fact(asked=["off"], seen=sorted(forwards.autocast)),
            "prompt_tokens": lambda: _prompt_tokens(workload, program),
            "prefill": lambda: Fact(asked=[workload.batch, width], seen=list(forwards.first["input_ids"].shape)),
        },
    )


def _cache_kind(forwards: Forwards) -> str:
    if forwards.cache is None:
        return "off"
    name = type(forwards.cache).__name__
    return {"DynamicCache": "dynamic", "StaticCache": "static"}.get(name, name)


def _cache_length(workload: GenerateSpec, forwards: Forwards, expected: int) -> Fact | None:
    if workload.cache == "off" or forwards.cache is None:
        return None
    return Fact(asked=expected, seen=int(forwards.cache.get_seq_length()))


def _mode(forwards: Forwards) -> str:
    return f"on in {forwards.training} of {forwards.modules} modules" if forwards.training else "off"


def _prompt_tokens(workload: GenerateSpec, program: GenerateProgram) -> Fact:
    """Compare the unpadded tokens of all prompts with the masks on the device.

    Random prompts have a known length; for others, the data is counted.
    """
    expected = sum(prompt.tokens for prompt in program.prompts)
    if workload.data.source == "random":
        assert workload.prompt_length is not None
        expected = workload.batch * workload.prompt_length * workload.prompts
    masks = [inputs["attention_mask"] for inputs in program.inputs]
    return Fact(asked=expected, seen=int(torch.stack([mask.sum() for mask in masks]).sum()))
