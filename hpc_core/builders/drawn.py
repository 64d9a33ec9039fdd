"""Random weights that depend only on a parameter's name and the seed, not on the rest of the model or the order of building.

Each parameter has its own random stream, so that a single one can be drawn again and compared with the live one.
"""

from __future__ import annotations

import hashlib

import torch

STD = 0.02
"""transformers' initializer_range of these architectures."""


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill every matrix of the model in place. Norms keep their ones, biases their zeros."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            _fill(parameter.data, name, seed)


def drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Return what `draw_weights` gives the parameter of this name. Bits are equal within a process, library version and device only."""
    return _fill(torch.empty(shape, dtype=dtype, device=device), name, seed)


def _fill(tensor: torch.Tensor, name: str, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    stream = torch.Generator(device=tensor.device)
    stream.manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # torch takes 63 bits
    return tensor.normal_(0.0, STD, generator=stream)
