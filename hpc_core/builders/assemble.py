"""`build(case)`: the module of a case, made in a fixed order: model, quantization, `prepare`, adapter, checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hpc_core.builders.adapter import attach_adapter, merged, prepare_for_training
from hpc_core.builders.causal_lm import causal_lm, tokenizer_of
from hpc_core.builders.quantization import quantize
from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.workloads import FinetuneSpec


def enable_checkpointing(model: torch.nn.Module, kind: str, *, frozen_inputs: bool) -> None:
    """Turn on gradient checkpointing of every decoder layer, "reentrant" or "non-reentrant"; "off" changes nothing.

    The reentrant kind builds a graph only if its inputs need gradients. If the embeddings are frozen (`frozen_inputs`, with any
    adapter), their outputs are made to need gradients, as peft does.
    """
    if kind == "off":
        return
    hugging: Any = model
    reentrant = kind == "reentrant"
    # transformers 5.24 has a new name for this call and warns. Only this name also exists in 5.17.
    hugging.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant and frozen_inputs:
        hugging.enable_input_require_grads()


@dataclass(frozen=True)
class Built:
    """A module that is ready to run, with its device and tokenizer."""

    model: torch.nn.Module
    device: torch.device
    vocab_size: int
    tokenizer: Any | None
    """The tokenizer of real weights; None for random weights."""


def build(case: Case, device: torch.device) -> Built:
    """Build the module that this case describes on `device`, in training mode if it is to be trained.

    One that generates is as `from_pretrained` leaves it: in evaluation mode, and its weights require gradients. That no graph is
    recorded is the work of `generate`, and a change there must show.

    Raises:
        SpecError: the case is a callable, which builds its own module.
        BuildError: the module is not what the case describes.
        MissingLibraryError: a package that the case needs is not installed.
    """
    if case.model is None:
        raise SpecError(f"{case.id} is a callable case, which builds its own module.")
    model = causal_lm(case.model, device, quantization=case.quantization)
    if case.quantization is not None:
        quantize(model, case.quantization, device)
    if isinstance(case.workload, FinetuneSpec):
        model = _ready_to_train(model, case, case.workload)
    else:
        if case.adapter is not None:
            torch.manual_seed(case.seed)
            model = merged(attach_adapter(model, case.adapter))
    config: Any = getattr(model, "config")  # noqa: B009 - transformers' models have it, torch's stubs do not know
    vocabulary = int(config.get_text_config().vocab_size)
    return Built(model=model, device=device, vocab_size=vocabulary, tokenizer=tokenizer_of(case.model))


def _ready_to_train(model: torch.nn.Module, case: Case, workload: FinetuneSpec) -> torch.nn.Module:
    if workload.prepare:
        model = prepare_for_training(model, workload.checkpointing)
    torch.manual_seed(case.seed)  # the adapter's initialization
    if case.adapter is not None:
        model = attach_adapter(model, case.adapter)
    if not workload.prepare:
        enable_checkpointing(model, workload.checkpointing, frozen_inputs=case.adapter is not None)
    config: Any = getattr(model, "config")  # noqa: B009
    config.use_cache = False
    return model.train()
