"""Watch every operator of a step on fake tensors, and record what a GPU's allocator would allocate and free.

The watch is below autograd, so it observes what autograd saves, frees and recomputes. It knows no model. Other modules define what
an operator allocates beyond the tensors that it returns (`fake_bitsandbytes`) and how many kernels it launches (`kernels`).
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, shape_wrapper

from hpc_core.case.errors import PredictError
from hpc_core.instruments.counters import FREE, own_formulas
from hpc_core.instruments.host import HostCounter
from hpc_core.instruments.places import nowhere
from hpc_core.instruments.timeline import Allocation, Timeline
from hpc_core.predict.allocator import Allocator
from hpc_core.predict.fake_bitsandbytes import CONSTANTS_FIRST, STAND_INS
from hpc_core.predict.kernels import Launches
from hpc_core.predict.policy import ValuePolicy
from hpc_core.predict.strides import with_real_strides
from hpc_core.record.gpus import Gpu

aten: Any = torch.ops.aten

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "addmv", "mv", "dot"}
"""Operators that use cuBLAS, whose handle has one workspace per thread."""
_LT_APART = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""Whether cuBLASLt has its own workspace. Since torch 2.13 it shares that of cuBLAS."""
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_KNOWN = {"aten", "prim", "prims", "profiler", "bitsandbytes"}
"""Namespaces of operators whose memory is known: their outputs, and what `fake_bitsandbytes` adds."""


@dataclass(frozen=True)
class Counts:
    """What was dispatched, computed and launched since `GpuWatch.begin`."""

    operators: int
    flops: int
    kernels: int
    copies: int


class GpuWatch(TorchDispatchMode):
    """Pass the creation and end of each CUDA storage to the allocator model. Called with a name, it begins a phase of the step."""

    def __init__(self, gpu: Gpu, policy: ValuePolicy):
        super().__init__()
        self.gpu = gpu
        self.allocator = Allocator()
        self.timeline = Timeline()
        self.peaks: dict[str, int] = {}
        """Peak bytes by phase, as `max_memory_allocated` would report them."""
        self.launches = Launches()
        self.operators: Counter[str] = Counter()
        """Dispatched operators, views included: the same count as that of the `counters` instrument."""
        self.flops = 0
        self._formulas = _formulas()
        self._within = 0
        """Depth inside an operator that was counted as one."""
        self._inside = 0
        """Depth inside a stand-in, whose FLOPs were counted as one."""
        self.place = nowhere
        """Returns the module for which an operator runs."""
        self.uses: Counter[tuple[str, str, str]] = Counter()
        """Operators by module, phase and name, since `begin`."""
        self.policy = policy
        self._phases: list[str] = []
        self._phase = -1
        self._clock = 0
        self._known: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self._living: dict[int, Allocation] = {}
        self._threads: set[tuple[int, str]] = set()

    def begin(self, phases: Sequence[str]) -> None:
        """Begin a step: what is alive now existed before it, and peaks start from there."""
        self._phases, self._phase, self._clock = list(phases), -1, 0
        for piece in self._living.values():
            piece.born, piece.phase = 0, -1
        self.timeline = Timeline(list(self._living.values()))
        self.peaks = {}
        self.launches, self.operators, self.uses, self.flops = Launches(), Counter(), Counter(), 0
        self._formulas = _formulas()  # bitsandbytes has registered its operators by now
        self.allocator.reset_peaks()

    def __call__(self, phase: str) -> None:
        """Begin a phase."""
        self.end_phase()
        self._phase = self._phases.index(phase)

    def reset_peaks(self) -> None:
        """Do what `torch.cuda.reset_peak_memory_stats` does for the code under test. The phase keeps its peak."""
        self.end_phase()

    def end_phase(self) -> None:
        """End the current phase and keep its peak."""
        if self._phase >= 0:
            name = self._phases[self._phase]
            self.peaks[name] = max(self.allocator.peak_allocated, self.peaks.get(name, 0))
        self.allocator.reset_peaks()

    def counts(self) -> Counts:
        """Return what has run since `begin`."""
        return Counts(self.operators.total(), self.flops, self.launches.kernels, self.launches.copies)

    def own_now(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Set the category of these tensors."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._known.get(id(storage))
            if known is not None and known[0]() is storage:
                known[1].category = category

    def name(self, module: str, tensors: Iterable[torch.Tensor]) -> None:
        """Set the module that these tensors belong to."""
        for tensor in tensors:
            known = self._known.get(id(tensor.untyped_storage()))
            if known is not None and known[0]() is tensor.untyped_storage():
                known[1].module = module

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, so that torch does not wrap the method below: no function is compiled in a prediction."""
        return False

    @HostCounter.pausing
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator on fake tensors, and record what a GPU would allocate, free and launch."""
        kwargs = kwargs or {}
        if func.namespace == "prim" or _without_tensors(func):
            return func(*args, **kwargs)
        _refuse_unknown(func)
        if not self._within and func.namespace not in FREE:
            self.operators[str(func)] += 1
            self.uses[self.place(), self._phases[self._phase] if self._phase >= 0 else "", str(func)] += 1
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and _composite(func):
            return self._in_parts(func, args, kwargs)
        out = self._leaf(func, args, kwargs)
        if formula is not None and not self._inside:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out

    def _leaf(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an operator that has a kernel on a GPU."""
        name = func._schema.name.partition("::")[2]
        if name in _INDEXED:
            args = self._with_numbers(args)
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        on_gpu = any(map(_on_gpu, inputs))
        if func is aten._local_scalar_dense.default:
            self.launches.copies += on_gpu
            return self.policy.scalar(inputs[0])
        if on_gpu and name in STAND_INS:
            return self._stand_in(func, name, args, kwargs)
        if on_gpu and name in _PRODUCTS:
            self._workspace(added=name == "addmm" and min(args[1].shape) > 1)
        if self._accumulates(func, args, kwargs):
            self.launches.add(func, name, args, inputs, [])
            return args[0]
        out = self._by_values(func, args, kwargs, inputs)
        if out is None:
            out = with_real_strides(name, inputs, func(*args, **kwargs))
        outputs = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
        for value in reversed(outputs) if name in CONSTANTS_FIRST else outputs:
            self._add(value, str(func))
        self.policy.follow(func, args, kwargs, inputs, outputs)
        if on_gpu or any(map(_on_gpu, outputs)):
            self._launched(func, name, args, inputs, outputs)
        return out

    def _by_values(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        """Run an operator whose result, or whose shape, depends on values that are known. None: it does not, or they are unknown."""
        if not _BY_VALUES.intersection(func.tags):
            return None
        found = self.policy.run(func, args, kwargs, inputs)
        if found is None or not any(isinstance(value, torch.Tensor) for value in tree_leaves(found)):
            return found
        device = "cuda" if any(map(_on_gpu, inputs)) else "cpu"
        return tree_map_only(
            torch.Tensor, lambda value: torch.empty(value.shape, dtype=value.dtype, device=device), found
        )

    def _with_numbers(self, args: Any) -> Any:
        """Return an indexing operator's arguments with the numbers of rows in place of masks that are known, as a GPU expands them."""
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        if not masks or any(self.policy.of(mask) is None for mask in masks):
            return args
        indices: list[torch.Tensor | None] = []
        self._within += 1
        try:
            with self:
                for index in args[1]:
                    indices += index.nonzero().unbind(1) if any(index is mask for mask in masks) else [index]
        finally:
            self._within -= 1
        return (args[0], indices, *args[2:])

    def _launched(
        self, func: Any, name: str, args: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        if name == "_to_copy" and inputs and not _on_gpu(inputs[0]):
            # A GPU tensor made from Python numbers: a real run dispatches nothing, and copies nothing if it is empty.
            self.operators[str(func)] -= 1
            if inputs[0].numel() == 0:
                return
        self.launches.add(func, name, args, inputs, outputs)

    def _stand_in(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run what the operator does internally. Its parts allocate and launch, but are not operators of the step."""
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        self._within += 1
        self._inside += 1
        try:
            with self:
                return STAND_INS[name](self.gpu, self.launches.add_inside, **given)
        finally:
            self._within -= 1
            self._inside -= 1

    def _in_parts(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the parts of a composite operator, which arrives as one where autograd is off. The parts have kernels and FLOPs."""
        self._within += 1
        try:
            with self:
                return func.decompose(*args, **kwargs)
        finally:
            self._within -= 1

    def _accumulates(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Return whether autograd would add this gradient in place. Under a dispatch mode it never does.

        Autograd's InputBuffer adds a second gradient into the first if nothing else refers to it. See
        `InputBuffer::accumulate` and `can_accumulate_inplace` in torch/csrc/autograd/input_buffer.cpp.
        """
        if func is not aten.add.Tensor or kwargs or torch.is_grad_enabled() or self._phase < 0:
            return False
        if torch._C._current_graph_task_id() < 0:  # autograd is not running: the model adds two tensors
            return False
        first, second = args
        if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
            return False
        if not _on_gpu(first) or first.shape != second.shape or first.dtype != second.dtype:
            return False
        storage = first.untyped_storage()
        whole = storage.nbytes() == first.numel() * first.element_size()
        dense = bool(torch._prims_common.is_non_overlapping_and_dense_or_false(first))
        return whole and dense and torch._C._storage_Use_Count(storage._cdata) <= 2

    def _workspace(self, *, added: bool) -> None:
        """Allocate the workspace at a thread's first product. `added`: a bias or matrix is added, which uses cuBLASLt and its workspace."""
        wanted = [("cuBLAS workspace", self.gpu.workspace_bytes)]
        if added and _LT_APART:
            wanted.append(("cuBLASLt workspace", self.gpu.lt_workspace_bytes))
        for source, size_bytes in wanted:
            key = (threading.get_ident(), source)
            if key not in self._threads:
                self._threads.add(key)
                self._take(size_bytes, source).category = "other"

    def _take(self, size_bytes: int, source: str) -> Allocation:
        self._clock += 1
        piece = Allocation(size_bytes=size_bytes, born=self._clock, phase=self._phase, source=source)
        piece.module = self.place()
        piece.block = self.allocator.malloc(size_bytes)
        self._living[id(piece)] = piece
        self.timeline.allocations.append(piece)
        return piece

    def _give(self, piece: Allocation) -> None:
        self._clock += 1
        piece.died, piece.died_in = self._clock, self._phase
        self.allocator.free(piece.block)
        del self._living[id(piece)]

    def _add(self, tensor: torch.Tensor, source: str) -> None:
        if not _on_gpu(tensor):
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            return
        piece = self._take(storage.nbytes(), source)

        def died(_: Any) -> None:
            self._give(piece)
            if self._known.get(key, (None, None))[1] is piece:
                del self._known[key]

        self._known[key] = (weakref.ref(storage, died), piece)


@functools.cache
def _without_tensors(func: Any) -> bool:
    """Return whether an operator neither takes nor returns a tensor, such as `torchvision::_cuda_version`."""
    schema = func._schema
    return not any("Tensor" in str(part.type) for part in (*schema.arguments, *schema.returns))


def _refuse_unknown(func: Any) -> None:
    if func.namespace not in _KNOWN:
        raise PredictError(
            f"The operator {func._schema.name} cannot be predicted: its memory and kernels on a GPU are unknown. "
            "Predict the case without it, or measure it on a GPU."
        )


def _on_gpu(tensor: torch.Tensor) -> bool:
    # `tensor.device` of a fake tensor is an operator and would enter the watch again.
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


@functools.cache
def _composite(func: Any) -> bool:
    """Return whether a GPU runs the parts of this operator.

    Some composite operators have kernels too. Those that have one on a CPU have one on CUDA (native_functions.yaml, for example
    `silu_backward`).
    """
    if func.namespace != "aten":
        return False
    return bool(func._can_decompose()) and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")


def _formulas() -> dict[Any, Any]:
    """Return FLOP formulas by operator: torch's, and those of `own_formulas`, which take shapes."""
    return flop_registry | {operator: shape_wrapper(formula) for operator, formula in own_formulas().items()}
