"""How much of the measured copy rate decoding reaches."""

from __future__ import annotations

import statistics

from hpc_core.bounds.cost import decode_bytes, int8_head_bytes
from hpc_core.engines.generate import GenerateProgram
from hpc_core.worker.metrics import ratio
from hpc_core.worker.session import Session

__all__ = ["share_of_copy"]


def share_of_copy(session: Session, program: GenerateProgram) -> None:
    """`mbu`, model bandwidth utilization of decoding: bytes that must be read over wall time and the measured copy rate."""
    ceiling = session.job.ceilings.get("copy_bytes_per_s")
    model = session.case.model
    assert model is not None
    shape = model.sizes
    if ceiling is None or shape is None:
        return
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[model.dtype]
    length = statistics.fmean(len(prompt.ids[0]) for prompt in program.prompts) + program.new_tokens / 2
    cache = int(
        2
        * shape.num_hidden_layers
        * shape.num_key_value_heads
        * shape.head_dim
        * width
        * length
        * program.workload.batch
    )
    embedding = shape.vocab_size * shape.hidden_size * width
    needed = decode_bytes(int(session.metrics["weights_bytes"].value), embedding, shape.tie_word_embeddings, cache)
    if program.workload.head == "int8":
        needed -= embedding - int8_head_bytes(shape)
    per_token = needed / session.metrics["decode_token_s"].value
    session.metrics["mbu"] = ratio(
        per_token / ceiling, note="bytes a token must read over wall time and the measured copy rate"
    )
