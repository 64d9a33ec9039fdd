"""Cases of every architecture in `hpc_core/case/models.jsonl`: a LoRA step and a generation, of the whole model and of a tiny one."""

from __future__ import annotations

from hpc_core.case.case import Case
from hpc_core.case.shapes import MODELS
from hpc_core.catalogue.shorthand import finetune, generate, lora, model_of

ARCHITECTURES: tuple[str, ...] = tuple(name for name in MODELS if name not in ("tiny", "smollm2-135m"))
"""The rows that are models of their own."""


def lora_step(name: str, *, tiny: bool) -> Case:
    """Return `<name>/lora-1x512`, a step with LoRA on the row's targets, or `tiny-<name>/lora`."""
    model = model_of(name, tiny=tiny)
    # Dropout takes other bytes on a CPU (a float mask) than on a GPU (a boolean one).
    adapter = lora(targets=MODELS[name].targets, dropout=0.0 if tiny else 0.05)
    if tiny:
        return finetune(model, adapter, batch=2, length=64, steps=1, timeout_s=120)
    return finetune(model, adapter, variant="lora-1x512", batch=1, length=512)


def answer(name: str, *, tiny: bool) -> Case:
    """Return `<name>/generate-512`, a prompt and its answer, or `tiny-<name>/generate`."""
    model = model_of(name, tiny=tiny)
    if tiny:
        return generate(model, prompts=1, prompt_length=24, new_tokens=8, timeout_s=120)
    return generate(model, variant="generate-512", prompts=1, prompt_length=512, new_tokens=32)


CASES: tuple[Case, ...] = tuple(
    case(name, tiny=tiny) for name in ARCHITECTURES for case in (lora_step, answer) for tiny in (True, False)
)
