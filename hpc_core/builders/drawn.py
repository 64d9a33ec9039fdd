"""Random weights: what a parameter of this name holds under this seed, whatever else the model has, and in whichever order it was built.

Each parameter has a stream of its own, so that one of them can be drawn again, alone, and compared with the live one.
"""

from __future__ import annotations

import hashlib

import torch

STD = 0.02
"""transformers' own initializer_range of these architectures."""


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill every matrix of the model in place; norms keep their ones, biases their zeros."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            _fill(parameter.data, name, seed)


def drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """What `draw_weights` gives the parameter of this name. The same process, library and device give the same bits; others may not."""
    return _fill(torch.empty(shape, dtype=dtype, device=device), name, seed)


def _fill(tensor: torch.Tensor, name: str, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    stream = torch.Generator(device=tensor.device)
    stream.manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # torch takes 63 bits
    return tensor.normal_(0.0, STD, generator=stream)
