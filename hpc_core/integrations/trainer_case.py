"""A run of transformers' Trainer as a case: how much work it was asked for. Everything else about it is seen, not asked.

A case's digest decides what may be compared. So only what sets the amount of work is in it; an optimizer, a precision or
checkpointing that changed, by accident or by a new default of a library, is then a regression that is found.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec
import torch

from hpc_core.case.case import Case
from hpc_core.case.limits import Limits
from hpc_core.case.workloads import CallableSpec

FACTORY = "transformers:Trainer"
_ASKED = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed")
_SEEN = (
    *("optim", "optim_args", "learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps"),
    *("bf16", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile"),
    *("use_liger_kernel", "neftune_noise_alpha", "dataloader_num_workers", "train_sampling_strategy"),
    *("max_length", "packing", "packing_strategy", "padding_free", "completion_only_loss", "assistant_only_loss"),
)
"""Of TrainingArguments, and of TRL's."""


def trainer_case(case_id: str, args: Any, state: Any, loader: Any, *, cuda: bool, limits: Limits) -> Case:
    """The case of a training that begins now.

    Raises:
        SpecError: the id is none.
    """
    asked = {name: getattr(args, name) for name in _ASKED if getattr(args, name, None) is not None}
    return Case(
        id=case_id,
        scale="full" if cuda else "tiny",
        workload=CallableSpec(
            factory=FACTORY,
            arguments=asked | {"processes": args.world_size} | _rows(loader),
            steps=max(int(state.max_steps), 1),
        ),
        limits=limits,
    )


def _rows(loader: Any) -> dict[str, int]:
    try:
        return {"rows": len(loader.dataset)}
    except (TypeError, AttributeError):  # a stream has no length
        return {}


def settings(args: Any, model: torch.nn.Module) -> str:
    """What else was set, in a line for the record's notes: the first thing to look at when a number has moved."""
    said = [type(model).__name__, type(args).__name__]
    for name in _SEEN:
        value = getattr(args, name, None)
        value = value.value if isinstance(value, enum.Enum) else value
        if value not in (None, False):
            said.append(f"{name}={msgspec.json.encode(value, enc_hook=str).decode()}")
    return ", ".join(said)
