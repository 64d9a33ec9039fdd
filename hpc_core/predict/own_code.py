"""A step of the user's own on the fake GPU.

The built-in cases get their device as an argument and never ask a tensor for its value. A user's step may look for a GPU, so
`torch.cuda` reports one. It may also ask for values: those that `policy` follows are answered. Of an unknown one, `item()` returns
a number that can be added, kept and printed. Code that makes a decision on it (`if`, `<`, `range`), or asks a tensor for all of its
values, is refused with its place, because the branch that real data would take is unknown.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from hpc_core.case.errors import HpcCoreError, PredictError, library
from hpc_core.predict.policy import ValuePolicy
from hpc_core.predict.watch import GpuWatch
from hpc_core.record.exceptions import message_of

_OURS = ("torch", "hpc_core", "unittest", "contextlib")
_MASKING = "transformers.masking_utils"


_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})


def _place(frames: Iterable[tuple[FrameType, int]]) -> str:
    """Return the user's line among these, as "file.py:12": the last one; after it, the library's that it led to."""
    own = inside = ""
    for frame, line in frames:
        file = frame.f_code.co_filename
        if file.startswith("<") or str(frame.f_globals.get("__name__", "")).partition(".")[0] in _OURS:
            continue
        library_of = next((folder for folder in _LIBRARIES if file.startswith(folder)), None)
        if library_of is None:
            own, inside = f"{file}:{line}", ""
        else:
            inside = f"{file.removeprefix(library_of).removeprefix('site-packages/')}:{line}"
    return f"{own} (inside {inside})" if own and inside else own or inside


def place_of(error: BaseException) -> str:
    """Return the user's line that raised the error, or an empty string."""
    return _place((frame, line) for frame, line in traceback.walk_tb(error.__traceback__))


def _refuse(what: str) -> NoReturn:
    frames = list(traceback.walk_stack(sys._getframe(1)))[::-1]
    place = _place(frames)
    if any(frame.f_globals.get("__name__") == _MASKING for frame, _ in frames):
        raise PredictError(
            f"{place}: transformers checks whether the padding mask hides anything, but the mask was computed from values that a "
            "prediction does not have. Make it from numbers that the script knows, such as torch.ones(batch, length), or omit it."
        )
    raise PredictError(
        f"{place} {what}, but a prediction has no values, so the branch that real data would take is unknown. Remove that "
        "from the step, or measure it on a GPU."
    )


class Unknown(float):
    """The number that a fake tensor returns. Arithmetic gives another one, its text is "unknown", and comparing it is an error."""

    def __repr__(self) -> str:
        return "unknown"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return "unknown"

    def __hash__(self) -> int:
        _refuse("uses the value of a tensor as a key")

    def __bool__(self) -> bool:
        _refuse("decides by the value of a tensor")

    def __int__(self) -> int:
        _refuse("makes an integer of the value of a tensor")

    __index__ = __trunc__ = __floor__ = __ceil__ = __int__


def _arithmetic(name: str) -> Callable[..., Any]:
    def result(self: Unknown, *_: object) -> Unknown:
        return Unknown(1.0)

    result.__name__ = name
    return result


def _comparison(name: str) -> Callable[..., Any]:
    def result(self: Unknown, _: object) -> NoReturn:
        _refuse("decides by the value of a tensor")

    result.__name__ = name
    return result


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), "neg", "pos", "abs", "round"):
    setattr(Unknown, f"__{_name}__", _arithmetic(_name))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Unknown, f"__{_name}__", _comparison(_name))


@contextlib.contextmanager
def values_are_unknown(policy: ValuePolicy) -> Iterator[None]:
    """Make fake tensors answer questions about their values as this module describes. Real tensors are unaffected."""
    with contextlib.ExitStack() as stack:

        def instead(name: str, unknown: Callable[..., Any], known: Callable[..., Any] | None = None) -> None:
            """Answer with torch's own method where the value is known: the watch returns it. `known` is called on the values."""
            original = getattr(torch.Tensor, name)

            def patched(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if not isinstance(self, FakeTensor):
                    return original(self, *args, **kwargs)
                values = policy.of(self)
                if values is None:
                    return unknown(original, self, *args, **kwargs)
                if known is None:
                    return original(self, *args, **kwargs)
                self.cpu()  # the copy from the GPU is an operator of the step
                with unset_fake_temporarily():
                    return known(values, *args, **kwargs)

            stack.enter_context(mock.patch.object(torch.Tensor, name, patched))

        instead("item", _item)
        instead("__float__", _item)
        instead("__bool__", lambda *_: _refuse("decides by the value of a tensor"))
        for name in ("__int__", "__index__"):
            instead(name, lambda *_: _refuse("makes an integer of the value of a tensor"))
        for name in ("numpy", "__array__"):
            instead(name, lambda *_, **__: _refuse("takes a tensor to NumPy"), getattr(torch.Tensor, name))
        instead("__contains__", lambda *_: _refuse("looks for a value in a tensor"), torch.Tensor.__contains__)
        instead("__format__", _text)
        instead("tolist", lambda *_: _refuse("makes a list of the values of a tensor"), torch.Tensor.tolist)
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", torch.Tensor.tolist))
        yield


def _item(original: Any, tensor: Any) -> Unknown:
    original(tensor)  # the copy from the GPU is an operator of the step
    return Unknown(1.0)


def _text(original: Any, tensor: Any, spec: str) -> str:
    return format(tensor.detach().item(), spec) if tensor.dim() == 0 else object.__format__(tensor, spec)


_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
)
_NO_FAKE = (fake_tensor.UnsupportedFakeTensorException, fake_tensor.UnsupportedOperatorException)


@contextlib.contextmanager
def own_code(watch: GpuWatch, name: str) -> Iterator[None]:
    """Show one GPU to code outside torch. Turn whatever it raises into an error message that starts with `name`.

    Raises:
        PredictError: the code asks for the value of a tensor, runs an operator that depends on values or cannot be predicted,
            or raises anything else.
    """
    try:
        with _visible(watch), _operators_on_lists(), values_are_unknown(watch.policy), _never_ends_early(watch.policy):
            yield
    except HpcCoreError:
        raise
    except _VALUES as error:
        raise PredictError(
            f"{name}: the shape or value of {error.func} depends on data, which a prediction does not have"
            f"{_at(error)}. Remove it from the step, or measure it on a GPU."
        ) from error
    except _NO_FAKE as error:
        raise PredictError(
            f"{name}: {error} has no fake implementation{_at(error)}. Measure the step on a GPU."
        ) from error
    except Exception as error:
        raise PredictError(
            f"{name} raised {type(error).__name__} on fake tensors{_at(error)}: {_first_line(error)} If it runs on "
            "real tensors, it does something that cannot be predicted: measure it on a GPU."
        ) from error


def _at(error: BaseException) -> str:
    place = place_of(error)
    return f" ({place})" if place else ""


def _first_line(error: BaseException) -> str:
    return f"{message_of(error).splitlines()[0].rstrip('.')}."


@contextlib.contextmanager
def _operators_on_lists() -> Iterator[None]:
    """Let torch use its operators on lists of tensors, which it restricts to types that it knows, for fake tensors too."""
    with contextlib.ExitStack() as stack:
        for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            holder: Any = importlib.import_module(module)
            known = [*holder._foreach_supported_types, fake_tensor.FakeTensor]
            stack.enter_context(mock.patch.object(holder, "_foreach_supported_types", known))
        yield


@contextlib.contextmanager
def _never_ends_early(policy: ValuePolicy) -> Iterator[None]:
    """Let `generate` make all tokens that it may make: no answer ends before."""
    criteria: Any = library("transformers.generation.stopping_criteria", "Prediction").EosTokenCriteria
    ended = criteria.__call__

    def not_ended(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = ended(self, *args, **kwargs)
        policy.declare(found, value=False)
        return found

    with mock.patch.object(criteria, "__call__", not_ended):
        yield


class _Stream:
    """A stream or an event of the fake GPU: everything has been done already. How long it took is unknown."""

    def __init__(self, *_: object, **__: object) -> None:
        self.device = torch.device("cuda", 0)
        self.cuda_stream = 0

    def query(self) -> bool:
        """Return True."""
        return True

    def elapsed_time(self, _: object) -> Unknown:
        """Return an unknown number of milliseconds."""
        return Unknown(1.0)

    def record_event(self, event: Any = None) -> Any:
        """Return the event."""
        return event or _Stream()

    def record(self, *_: object) -> None:
        """Do nothing."""

    wait = synchronize = wait_stream = wait_event = record


@contextlib.contextmanager
def _visible(watch: GpuWatch) -> Iterator[None]:
    """Make `torch.cuda` report one GPU to everyone but torch itself, which would use it."""
    gpu, allocator = watch.gpu, watch.allocator
    facts = SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory_bytes,
        multi_processor_count=gpu.multiprocessors,
    )

    def free_and_total() -> tuple[int, int]:
        return gpu.memory_bytes - allocator.reserved, gpu.memory_bytes

    def statistics() -> dict[str, int]:
        return {
            "allocated_bytes.all.current": allocator.allocated,
            "allocated_bytes.all.peak": allocator.peak_allocated,
            "reserved_bytes.all.current": allocator.reserved,
            "reserved_bytes.all.peak": allocator.peak_reserved,
        }

    def generator_state() -> torch.Tensor:
        with unset_fake_temporarily():
            return torch.zeros(16, dtype=torch.uint8)

    answers: dict[str, Callable[[], Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda: gpu.name,
        "get_device_properties": lambda: facts,
        "get_arch_list": lambda: [f"sm_{gpu.capability[0]}{gpu.capability[1]}"],
        "empty_cache": allocator.empty_cache,
        "memory_allocated": lambda: allocator.allocated,
        "max_memory_allocated": lambda: allocator.peak_allocated,
        "memory_reserved": lambda: allocator.reserved,
        "max_memory_reserved": lambda: allocator.peak_reserved,
        "reset_peak_memory_stats": watch.reset_peaks,
        "reset_max_memory_allocated": watch.reset_peaks,
        "memory_stats": statistics,
        "memory_summary": lambda: "predicted",
        "mem_get_info": free_and_total,
        "get_memory_info": free_and_total,
        "get_rng_state": generator_state,
        "get_rng_state_all": lambda: [generator_state()],
        "Event": _Stream,
        "Stream": _Stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": contextlib.nullcontext,
        **dict.fromkeys(("set_device", "set_rng_state", "set_rng_state_all", "ipc_collect", "synchronize"), _nothing),
    }
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("peft") is not None:
            boft: Any = library("peft.tuners.boft.layer", "Prediction").BOFTLayer
            stack.enter_context(mock.patch.object(boft, "perm2mat", _permutation))
        # transformers would load weights in threads, where tensors are not fake; safetensors wraps a mapped file.
        stack.enter_context(mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        stack.enter_context(mock.patch.object(torch, "asarray", _asarray))
        for module in (torch.cuda, torch.accelerator):
            for name, answer in answers.items():
                if hasattr(module, name):
                    patched = _to_others(getattr(module, name), answer)
                    stack.enter_context(mock.patch.object(module, name, patched))
        yield


def _nothing() -> None:
    pass


def _permutation(_: Any, indices: torch.Tensor) -> torch.Tensor:
    """Make BOFT's permutation matrix at once: it sets its ones one by one, 100,000 operators for a model of three billion parameters."""
    return torch.zeros(len(indices), len(indices))


_real_asarray = torch.asarray


def _asarray(source: Any, **options: Any) -> torch.Tensor:
    with _disable_current_modes() if isinstance(source, torch.UntypedStorage) else contextlib.nullcontext():
        return _real_asarray(source, **options)


def _to_others(original: Callable[..., Any], answer: Callable[[], Any]) -> Callable[..., Any]:
    def answered(*args: Any, **kwargs: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        return original(*args, **kwargs) if caller == "torch" else answer()

    return answered
