"""Facts of a generation (KV cache, mode, autograd, tokens) and of the attention kernels that ran."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hpc_core.audit.forwards import Forwards
from hpc_core.case.case import Case
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.engines.generate import GenerateProgram
from hpc_core.instruments.counters import attention_families
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


_FUSED_KERNELS_SINCE = (8, 0)
"""The first compute capability with fused kernels for grouped queries in half precision."""


def attention_facts(case: Case, operators: Mapping[str, int], device: torch.device) -> Findings:
    """Return whether attention was fused (sdpa) or eager as the case asks, and which kernels ran.

    A case cannot ask for kernels, so `attention_kernel` always holds.
    """
    assert case.model is not None
    asked = case.model.attention
    families = attention_families(operators)

    def attention() -> Fact:
        if not families:
            raise LookupError("no operator of attention was seen")
        # Where CUDA has no fused kernel, sdpa correctly falls back to torch's math implementation.
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
    """Return whether torch has a fused kernel for grouped-query attention in this case's dtype.

    CUDA's are for half precision only: on an H100, float32 ran as math.
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
            return False  # float32 norms return float32, and quantized layers keep it
    return case.model.dtype != "float32"
