"""Full-size cases of different architectures: `pytest --benchmark --cases bench/architectures.py --case '*/*-512'` on a GPU of 80 GB or more.

Their predictions were made before any of them was measured.
"""

from __future__ import annotations

from hpc_core.catalogue import finetune, qlora
from hpc_core.catalogue.architectures import answer, lora_step
from hpc_core.catalogue.shorthand import model_of

__all__ = ["CASES"]

CASES = (
    lora_step("qwen3-30b-a3b", tiny=False),
    lora_step("gpt-oss-20b", tiny=False),
    answer("deepseek-v2-lite", tiny=False),
    lora_step("gemma-2-9b", tiny=False),
    lora_step("phi-4", tiny=False),
    lora_step("falcon-7b", tiny=False),
    answer("glm-4-9b", tiny=False),
    finetune(model_of("gpt2-xl"), qlora(targets=("c_attn",)), variant="qlora-1x512", batch=1, length=512),
)
