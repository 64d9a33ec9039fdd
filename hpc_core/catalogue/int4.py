"""int4 weights by torchao: generation by transformers and by the graph engine."""

from __future__ import annotations

from hpc_core.case.case import Case, QuantSpec
from hpc_core.catalogue.making import generate, llama_3b

__all__ = ["INT4"]

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
"""Stock and engine. Not in ALL: they need torchao, which is an extra of its own."""
