"""Steps as users write them: one trains a small model, the others cannot run on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Step = Callable[[], Any]


class TinyModel(nn.Module):
    """Embeddings, residual blocks, and a head that shares the embeddings' weights."""

    def __init__(self, vocabulary: int, width: int, layers: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of (batch, length) ids."""
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


def train(
    device: str, vocabulary: int = 512, width: int = 64, layers: int = 2, batch: int = 4, clip: bool = True
) -> Step:
    """A plain training step: the model is moved after construction, gradients are clipped, the loss is logged."""
    torch.manual_seed(0)
    model = TinyModel(vocabulary, width, layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    ids = torch.randint(0, vocabulary, (batch, 33)).to(device)
    log: list[str] = []

    def step() -> float:
        logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log[:] = [f"loss {loss:.3f}"]
        return loss.item() / 2

    return step


def picks_its_device(batch: int = 4) -> Step:
    """A step that chooses its device as most scripts do."""
    return train("cuda" if torch.cuda.is_available() else "cpu", batch=batch)


def stays_on_the_cpu() -> Step:
    """A step that never uses a GPU."""
    return train("cpu")


def optimizer_first(device: str) -> Step:
    """A step whose optimizer holds parameters from before the model was moved."""
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model.to(device)

    def step() -> None:
        model(torch.ones(2, 8, device=device)).sum().backward()
        optimizer.step()

    return step


def reads_values(what: str, device: str) -> Step:
    """A step that reads a tensor's value, in one of many ways."""
    values = torch.ones(4, 4, device=device)
    ways: dict[str, Callable[[], Any]] = {
        "branch on a tensor": lambda: 1 if (values > 0).any() else 2,
        "branch on a number": lambda: 1 if values.sum().item() > 3 else 2,
        "branch on a sum of numbers": lambda: 1 if sum(row.sum().item() for row in values) else 2,
        "range": lambda: range(int(values.sum())),
        "number of rows": lambda: range(values.sum().item()),  # type: ignore[arg-type]
        "best so far": lambda: max(1.0, values.sum().item()),
        "list": values.tolist,
        "numpy": lambda: values.cpu().numpy(),
        "membership": lambda: 1 in values,
        "rows of a mask": lambda: values[values > 0],
        "equal": lambda: torch.equal(values, values),
        "key of a dict": lambda: {values.sum().item(): 1},
        "raise": lambda: [][0],
    }
    return ways[what]


def refuses_hooks() -> Step:
    """A step that raises while hooks are registered on every module."""
    linear = nn.Linear(8, 8)

    def step() -> None:
        if nn.modules.module._global_forward_hooks_always_called:
            raise RuntimeError("no hooks here\nand more")
        linear(torch.ones(2, 8))

    return step
