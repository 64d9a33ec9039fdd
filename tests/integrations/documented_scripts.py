"""Trainings as transformers' documentation shows them: a loop written by hand and a Trainer. Nothing here knows hpc-core."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows without padding."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(32) + index
        return {"input_ids": ids, "labels": ids}


def _model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))


def by_hand(device: str) -> Callable[[], None]:
    """One epoch of "Fine-tune a model in native PyTorch"."""
    model = _model().to(device)
    loader = DataLoader(Rows(), shuffle=True, batch_size=4, collate_fn=default_data_collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    schedule = get_scheduler("linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=3 * len(loader))
    model.train()

    def epoch() -> None:
        for rows in loader:
            batch = {name: part.to(device) for name, part in rows.items()}
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    return epoch


def by_trainer(device: str) -> Callable[[], Any]:
    """`trainer.train()` of the quick tour."""
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=3,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=device == "cpu",
    )
    trainer = Trainer(_model(), arguments, train_dataset=Rows(), data_collator=default_data_collator)
    return lambda: trainer.train()
