"""Cases of our own engines, and the same cases with the stock libraries."""

from __future__ import annotations

from typing import Any

from hpc_core.case.case import Case
from hpc_core.case.parts import DataSpec, ModelSpec, QuantSpec
from hpc_core.catalogue.shorthand import (
    finetune,
    generate,
    llama_3b,
    lora,
    qlora,
)
from hpc_core.catalogue.stock import FULL

_TUNED: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "fusion": "blocks", "graph": True}
_PLAIN_ADAPTER: dict[str, Any] = {"dropout": 0.0, "adapter_dtype": "bfloat16"}
"""The tuned engine needs these settings, so the stock case to compare with has them too."""
_BATCHES = (4, 16, 32)
_NF4 = QuantSpec(kind="nf4", compute_dtype="bfloat16")
_NF4_DQ = QuantSpec(kind="nf4", compute_dtype="bfloat16", double_quant=True)
_ANSWERS: dict[str, Any] = {"prompts": 2, "prompt_length": 100, "new_tokens": 128, "timeout_s": 600}


def _name(case: Case) -> str:
    return case.id.rpartition("/")[2]


def _tuned(*stock: Case) -> list[Case]:
    """Return each case with the tuned engine. LoRA and QLoRA come with stock cases that have the engine's dropout and adapter dtype.

    LoRA's memory budget costs one or two milliseconds of recomputation. Without it the graph's pool takes 9.68 GiB.
    """
    full, *adapted = (case for name in ("full-bf16", "lora", "qlora") for case in stock if _name(case) == name)
    plain_lora, plain_qlora = (case.vary(f"{_name(case)}-nodrop", **_PLAIN_ADAPTER) for case in adapted)
    qlora = plain_qlora.vary("qlora-tuned", **_TUNED)
    return [
        full.vary("full-bf16-tuned", **_TUNED, optimizer_in_backward=True),
        plain_lora,
        plain_lora.vary("lora-tuned", **_TUNED, budget_bytes=19 * 2**29),
        plain_qlora,
        qlora,
        qlora.vary("qlora-tuned-4.5gib", budget_bytes=9 * 2**29),
    ]


def _decode(model: ModelSpec) -> tuple[Case, Case, Case, Case]:
    """Return bfloat16 and NF4, each with `generate` and with the graph engine, on the same prompts."""
    bf16 = generate(model, variant="generate-bf16-100", **_ANSWERS)
    nf4 = bf16.vary("generate-nf4-100", quantization=_NF4)
    return (
        bf16,
        bf16.vary("generate-bf16-graph", engine="graph"),
        nf4,
        nf4.vary("generate-nf4-graph", engine="graph"),
    )


_bf16, _bf16_graph, _nf4, _nf4_graph = DECODE = _decode(llama_3b)
STATIC = _bf16.vary("generate-bf16-static", cache="static")
"""transformers' own fast path: a static cache and a compiled forward."""
_int8_head = _nf4_graph.vary("generate-nf4-graph-int8-head", head="int8")

TUNED: tuple[Case, ...] = (
    *_tuned(*FULL),
    *DECODE,
    _int8_head,
)
"""Our engines and the stock cases to compare with: same dropout (none), adapters, batch, data and prompts. In ALL, not in FULL."""


def _of_another_shape(shape: str) -> list[Case]:
    """Return LoRA, QLoRA and decoding at another size, with stock and our engines. An epoch has the report's 4000 rows."""
    model = ModelSpec(shape=shape)
    step: dict[str, Any] = {"batch": 4, "length": 512, "epoch_rows": 4000}
    adapter: dict[str, Any] = {"dropout": 0.0, "dtype": "bfloat16"}
    stock = [
        finetune(model, lora(**adapter), variant="lora-nodrop", **step),
        finetune(model, qlora(**adapter), variant="qlora-nodrop", **step),
    ]
    return [
        *(each for case in stock for each in (case, case.vary(_name(case).replace("nodrop", "tuned"), **_TUNED))),
        *_decode(model),
    ]


def _report_by_graph() -> list[Case]:
    """Return the original report's generation cases with the graph engine, which has no int8 kernels. FULL has the stock cases."""
    variants = ("generate-fp16", "generate-bf16", "generate-nf4", "generate-nf4-dq")
    return [
        case.vary(f"{_name(case)}-questions-graph", engine="graph", timeout_s=600)
        for case in FULL
        if _name(case) in variants
    ]


def _real_epoch() -> list[Case]:
    """Return LoRA on the lengths of the report's 4000 rows: padded to 512 as in the report, packed, and packed with the tuned engine."""
    rows = DataSpec(source="trace", name="wikitext2", rows=4000)
    padded = finetune(
        llama_3b,
        lora(dropout=0.0, dtype="bfloat16"),
        variant="lora-rows-padded",
        padding="max_length",
        data=rows,
    )
    packed = padded.vary("lora-rows-packed", padding="none", packing=True)
    return [padded, packed, packed.vary("lora-rows-packed-tuned", **_TUNED)]


SWEEP: tuple[Case, ...] = (
    *(case.vary(f"{_name(case)}-b{batch}", batch=batch) for case in DECODE for batch in _BATCHES),
    *(
        case.vary(f"{_name(case)}-4k", prompt_length=4096, prompts=1, new_tokens=32)
        for case in (_bf16, _bf16_graph, _nf4, _nf4_graph)
    ),
    _bf16_graph.vary("generate-bf16-graph-torch", kernels="torch"),
    _bf16_graph.vary("generate-bf16-graph-inductor", kernels="inductor"),
    _bf16_graph.vary("generate-bf16-graph-int8-head", head="int8"),
    _bf16_graph.vary("generate-bf16-graph-sampled", temperature=0.8, top_k=50),
    _nf4.vary("generate-nf4-dq-100", quantization=_NF4_DQ),
    _nf4_graph.vary("generate-nf4-dq-graph", quantization=_NF4_DQ),
    *_report_by_graph(),
    *_real_epoch(),
    *_of_another_shape("llama-3.2-1b"),
    *_of_another_shape("llama-3.1-8b"),
)
"""Batches, long prompts, kernels, real rows and other sizes. Not in ALL: run them by name."""


_int4 = generate(
    llama_3b,
    variant="generate-int4",
    quantization=QuantSpec(kind="int4", compute_dtype="bfloat16", group_size=128),
    prompts=2,
    prompt_length=100,
    new_tokens=128,
    timeout_s=600,
)

INT4: tuple[Case, ...] = (_int4, _int4.vary("generate-int4-graph", engine="graph", kernels="inductor"))
"""int4 with stock and graph engine. Not in ALL: they need torchao, a separate extra."""
