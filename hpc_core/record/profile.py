"""A profile of one unit of work: memory at the peak, operators and kernels, by module.

It is stored beside the baseline and used in explanations. None of its numbers is judged.

A module is named by its path with layer numbers replaced by a star (`model.layers.*.mlp`), so that all layers share one entry. An
empty path means outside any module, such as in the loss or the optimizer.
"""

from __future__ import annotations

import msgspec


class _Row(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A row of a table, stored as an array without field names, because there are hundreds of rows."""


class Piece(_Row, frozen=True, array_like=True):
    """Memory alive at the peak that one operator allocated for one module."""

    category: str
    module: str
    phase: str
    """The phase that allocated it; empty if it existed before the step."""
    operator: str
    """Such as "aten.mul.Tensor". For memory from before the step, "held float32[2, 64, 512]", or empty."""
    size_bytes: int
    pieces: int


class OperatorUse(_Row, frozen=True, array_like=True):
    """How often one operator ran for one module in one phase."""

    module: str
    phase: str
    operator: str
    times: int


class KernelUse(_Row, frozen=True, array_like=True):
    """How often one kernel was launched for one operator of one module, and its total time."""

    module: str
    operator: str
    kernel: str
    """The profiler's name of it, cut to a readable length."""
    family: str
    launches: int
    seconds: float


class ModuleSeen(_Row, frozen=True, array_like=True):
    """The modules that share one path."""

    kind: str
    """The name of their class."""
    count: int
    calls: int
    """Forward calls of all of them, recomputation included."""


class FunctionUse(_Row, frozen=True, array_like=True):
    """What the host executed in one function."""

    work: str
    """What was run, as a step or query may have several parts."""
    file: str
    """Without the folder that it is imported from."""
    function: str
    """Its qualified name: "LlamaDecoderLayer.forward"."""
    line: int
    """Where it begins in the file."""
    bytecodes: int
    calls: int
    """Of this function."""
    c_calls: int
    """Of functions that are not Python's, by this one."""


class HostTime(_Row, frozen=True, array_like=True):
    """How long the host was in one line, computing or waiting, by samples."""

    file: str
    """Without the folder that it is imported from."""
    function: str
    line: int
    seconds: float
    """Of one step or query."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One unit of work, profiled in a separate pass."""

    work: str
    """What was run: "one step on the widest batch"."""
    phases: tuple[str, ...] = ()
    modules: dict[str, ModuleSeen] = {}
    at_peak: tuple[Piece, ...] = ()
    """Largest first. Requested bytes, without the allocator's rounding and without memory that libraries allocate themselves."""
    operators: tuple[OperatorUse, ...] = ()
    kernels: tuple[KernelUse, ...] = ()
    """Empty without a GPU."""
    functions: tuple[FunctionUse, ...] = ()
    host_times: tuple[HostTime, ...] = ()
    """What the host executed, the most bytecodes first."""

    @property
    def peak_bytes(self) -> int:
        """Return the bytes alive at the peak of this pass."""
        return sum(piece.size_bytes for piece in self.at_peak)
