"""Facts of a generation: the KV cache in use and its length, evaluation mode, no graph, tokens of prompt and answer.

Facts of attention: which kernel family really ran, by the operators that were counted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hpc_core.audit.forwards import ForwardsSeen
from hpc_core.case.case import Case
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.engines.generate import GenerateProgram
from hpc_core.instruments.counters import attention_families
from hpc_core.record.findings import Findings, checked
from hpc_core.record.record import Fact


def generation_facts(
    workload: GenerateSpec, program: GenerateProgram, seen: ForwardsSeen, *, new_tokens: int
) -> Findings:
    """Facts of one watched query: the first prompt and `new_tokens` tokens after it."""
    if not seen.calls:
        note = "audit: generate never called the model itself, so its cache and mode could not be seen"
        return Findings(notes=(note,)) | checked({"prompt_tokens": lambda: _prompt_tokens(workload, program)})
    width = len(program.prompts[0].ids[0])
    return checked(
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


_FUSED_KERNELS_SINCE = (8, 0)
"""Compute capability from which CUDA has fused kernels for grouped queries in half precision."""


def attention_facts(case: Case, operators: Mapping[str, int], device: torch.device) -> Findings:
    """Whether attention was fused (sdpa) or eager as asked, and by which kernels: a case cannot ask for those, so that fact always holds."""
    assert case.model is not None
    asked = case.model.attention
    families = attention_families(operators)

    def attention() -> Fact:
        if not families:
            raise LookupError("no operator of attention was seen")
        # Where CUDA has no fused kernel, torch's own choice is the math way: that is what sdpa means there.
        unfused_is_right = "math" in families and not _has_fused(case, device)
        kinds = {_kind(name, unfused_is_right=unfused_is_right) for name in families}
        return Fact(asked=asked, seen=", ".join(sorted(kinds)))

    def kernel() -> Fact | None:
        return Fact(asked=sorted(families), seen=sorted(families)) if families else None

    return checked({"attention": attention, "attention_kernel": kernel})


def _kind(family: str, *, unfused_is_right: bool) -> str:
    if family == "eager":
        return "eager"
    return "sdpa, unfused (math)" if family == "math" and not unfused_is_right else "sdpa"


def _has_fused(case: Case, device: torch.device) -> bool:
    """Whether torch has a fused kernel for grouped-query attention in this case's dtype.

    CUDA's fused kernels for grouped queries are half precision only (seen on an H100: float32 ran as math).
    """
    if device.type != "cuda":
        return True
    if torch.cuda.get_device_capability(device) < _FUSED_KERNELS_SINCE:
        return False
    assert case.model is not None
    workload = case.workload
    if isinstance(workload, FinetuneSpec):
        if workload.precision == "autocast-bf16":
            return True
        if workload.prepare:
            return False  # float32 norms hand float32 on, through every quantized layer
    return case.model.dtype != "float32"
