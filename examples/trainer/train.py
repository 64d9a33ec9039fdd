"""A training by transformers' Trainer that leaves a record: `python train.py`, seconds on a CPU.

The record is judged, accepted and shown like any other:

    hpc-core baseline accept runs/tiny.json --reason "the first one"
    hpc-core baseline diff runs/tiny.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hpc_core import Limits, MiB
from hpc_core.integrations import PerfCallback


class Rows(torch.utils.data.Dataset):
    """Rows of random length, padded to the longest."""

    def __init__(self, count: int, length: int) -> None:
        numbers = torch.Generator().manual_seed(0)
        self._ids = torch.randint(1, 256, (count, length), generator=numbers)
        self._ends = torch.randint(length // 2, length + 1, (count,), generator=numbers)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(self._ids.shape[1]) < self._ends[index]).long()
        return {"input_ids": self._ids[index] * mask, "labels": self._ids[index], "attention_mask": mask}


def main(folder: Path) -> Path:
    """Train, and say where the record lies."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    arguments = TrainingArguments(
        str(folder / "checkpoints"),
        max_steps=20,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    perf = PerfCallback(folder / "tiny.json", case="trainer/tiny", limits=Limits(peak_bytes=64 * MiB))
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=Rows(80, 64), callbacks=[perf])
    with perf:
        trainer.train()
    return perf.path


if __name__ == "__main__":
    sys.stdout.write(f"wrote {main(Path('runs'))}\n")
