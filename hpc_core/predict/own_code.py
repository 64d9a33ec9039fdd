"""A step of the user's own on the fake GPU.

The built-in cases get their device as an argument and never ask a tensor for its value. A user's step may look for a GPU, so
`torch.cuda` reports one. It may also ask for values, which fake tensors do not have: `item()` returns a number that can be
added, kept and printed. Code that makes a decision on it (`if`, `<`, `range`), or asks a tensor for all of its values, is refused
with its place, because the branch that real data would take is unknown.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hpc_core.case.errors import HpcCoreError, PredictError
from hpc_core.predict.fake_gpu import was_moved
from hpc_core.predict.watch import GpuWatch
from hpc_core.record.exceptions import message_of

_OURS = ("torch", "hpc_core", "unittest", "contextlib")
_MASKING = "transformers.masking_utils"


def _ours(module: str) -> bool:
    return module.partition(".")[0] in _OURS


def place_of(error: BaseException) -> str:
    """Return the user's line that raised the error, as "file.py:12", or an empty string."""
    found, at = "", error.__traceback__
    while at is not None:
        if not _ours(str(at.tb_frame.f_globals.get("__name__", ""))):
            found = f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"
        at = at.tb_next
    return found


def _caller() -> Any:
    """Return the nearest frame outside torch and hpc_core."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _ours(str(frame.f_globals.get("__name__", ""))):
        frame = frame.f_back
    return frame


def _refuse(what: str) -> NoReturn:
    frame = _caller()
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    if frame.f_globals.get("__name__") == _MASKING:
        raise PredictError(
            f"transformers checks whether the padding mask hides anything ({place}), but a prediction has no values. "
            "Omit attention_mask if nothing is padded, or measure the case on a GPU."
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


def _is_packing_check() -> bool:
    """Return whether transformers is looking for packed sequences. Positions that it made itself are in order."""
    frame = _caller()
    return bool(frame.f_globals.get("__name__") == _MASKING and frame.f_code.co_name.startswith("find_packed_sequence"))


@contextlib.contextmanager
def values_are_unknown() -> Iterator[None]:
    """Make fake tensors answer questions about their values as this module describes. Real tensors are unaffected."""
    with contextlib.ExitStack() as stack:

        def instead(name: str, answer: Callable[..., Any]) -> None:
            original = getattr(torch.Tensor, name)

            def patched(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if not isinstance(self, FakeTensor):
                    return original(self, *args, **kwargs)
                return answer(original, self, *args, **kwargs)

            stack.enter_context(mock.patch.object(torch.Tensor, name, patched))

        instead("item", lambda original, self: _item(original, self))
        instead("__float__", lambda original, self: _item(original, self))
        instead("__bool__", _truth)
        for name in ("__int__", "__index__"):
            instead(name, lambda original, self: _refuse("makes an integer of the value of a tensor"))
        for name in ("numpy", "__array__"):
            instead(name, lambda original, self, *_, **__: _refuse("takes a tensor to NumPy"))
        instead("__contains__", lambda original, self, *_: _refuse("looks for a value in a tensor"))
        instead("__format__", _text)
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", _list))
        yield


def _item(original: Any, tensor: Any) -> Unknown:
    original(tensor)  # the copy from the GPU is an operator of the step
    return Unknown(1.0)


def _truth(original: Any, tensor: Any) -> bool:
    if _is_packing_check():
        original(tensor)
        return True
    _refuse("decides by the value of a tensor")


def _text(original: Any, tensor: Any, spec: str) -> str:
    return format(tensor.detach().item(), spec) if tensor.dim() == 0 else object.__format__(tensor, spec)


def _list(tensor: Any) -> NoReturn:
    _refuse("makes a list of the values of a tensor")


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
    hook = register_optimizer_step_pre_hook(_refuse_left_behind)
    try:
        with _visible(watch), _operators_on_lists(), values_are_unknown():
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
    finally:
        hook.remove()


def _at(error: BaseException) -> str:
    place = place_of(error)
    return f" ({place})" if place else ""


def _first_line(error: BaseException) -> str:
    return f"{message_of(error).splitlines()[0].rstrip('.')}."


def _refuse_left_behind(optimizer: Any, *_: Any) -> None:
    """Refuse an optimizer of moved parameters. `model.to("cuda")` moves real parameters in place but replaces fake ones."""
    if any(was_moved(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        raise PredictError(
            f"The {type(optimizer).__name__} was created before its model was moved to the GPU, which a prediction cannot "
            "follow. Move the model first, then create the optimizer."
        )


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
    answers: dict[str, Callable[[], Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda: gpu.name,
        "get_device_properties": lambda: facts,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: allocator.allocated,
        "max_memory_allocated": lambda: allocator.peak_allocated,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            patched = _to_others(getattr(torch.cuda, name), answer)
            stack.enter_context(mock.patch.object(torch.cuda, name, patched))
        yield


def _to_others(original: Callable[..., Any], answer: Callable[[], Any]) -> Callable[..., Any]:
    def answered(*args: Any, **kwargs: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        return original(*args, **kwargs) if caller == "torch" else answer()

    return answered
