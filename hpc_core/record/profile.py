"""What a case did, piece by piece: memory at the peak, operators and kernels, each with the module that it was for.

A compact value for explanations, stored beside the baseline. No number of it is judged. No torch, no I/O.

Modules are named by their path with the layers' numbers replaced by a star (`model.layers.*.mlp`), so that what all layers do
is one entry. An empty path means: outside any module, such as in the loss or the optimizer.
"""

from __future__ import annotations

import msgspec


class _Row(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A line of a table: its fields are written without their names, since there are hundreds."""


class Piece(_Row, frozen=True, array_like=True):
    """Memory that lives at the peak and was made by one operator for one module."""

    category: str
    module: str
    phase: str
    """The phase that made it; empty where it was there before the step."""
    operator: str
    """Such as "aten.mul.Tensor"; of what was there before, "held float32[2, 64, 512]", or empty."""
    size_bytes: int
    pieces: int


class OperatorUse(_Row, frozen=True, array_like=True):
    """How often one operator ran for one module in one phase."""

    module: str
    phase: str
    operator: str
    times: int


class KernelUse(_Row, frozen=True, array_like=True):
    """How often one kernel was launched for one operator of one module, and how long it ran in all."""

    module: str
    operator: str
    kernel: str
    """Its name as the profiler gives it, cut to a readable length."""
    family: str
    launches: int
    seconds: float


class ModuleSeen(_Row, frozen=True, array_like=True):
    """The modules behind one path."""

    kind: str
    """Name of their class."""
    count: int
    calls: int
    """Forwards of all of them, those of recomputation included."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One unit of work, taken apart in a pass of its own."""

    work: str
    """What was run: "one step on the widest batch"."""
    phases: tuple[str, ...] = ()
    modules: dict[str, ModuleSeen] = {}
    at_peak: tuple[Piece, ...] = ()
    """The largest first. Bytes as asked for, without the allocator's rounding and without what libraries take for themselves."""
    operators: tuple[OperatorUse, ...] = ()
    kernels: tuple[KernelUse, ...] = ()
    """Empty where there is no GPU."""

    @property
    def peak_bytes(self) -> int:
        """Bytes alive at the peak, by this pass."""
        return sum(piece.size_bytes for piece in self.at_peak)
