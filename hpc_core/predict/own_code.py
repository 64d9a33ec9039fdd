"""A step of the user's own on the fake GPU: it finds the GPU that it looks for, and what cannot be faked is refused by name and place.

The built-in cases need none of this: they are told their device, and ask no tensor for its value.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hpc_core.case.errors import HpcCoreError, PredictError
from hpc_core.predict.fake import was_moved
from hpc_core.predict.unknown import place_of, values_are_unknown
from hpc_core.predict.watch import GpuWatch

__all__ = ["own_code"]

_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
)
_NO_FAKE = (fake_tensor.UnsupportedFakeTensorException, fake_tensor.UnsupportedOperatorException)


@contextlib.contextmanager
def own_code(watch: GpuWatch, name: str) -> Iterator[None]:
    """While active, code that is not torch's sees one GPU; whatever it raises becomes a sentence that starts with `name`.

    Raises:
        PredictError: the code asks for the value of a tensor, runs an operator whose result depends on values or that has no
            model, or raises anything else.
    """
    hook = register_optimizer_step_pre_hook(_refuse_left_behind)
    try:
        with _visible(watch), _in_lists_of_tensors(), values_are_unknown():
            yield
    except HpcCoreError:
        raise
    except _VALUES as error:
        raise PredictError(
            f"{name}: the shape or value of {error.func} depends on data, which a prediction does not have"
            f"{_at(error)}. Take it out of the step, or measure it on a GPU."
        ) from error
    except _NO_FAKE as error:
        raise PredictError(f"{name}: {error} has no fake{_at(error)}. Measure the step on a GPU.") from error
    except Exception as error:
        raise PredictError(
            f"{name} raised {type(error).__name__} on fake tensors{_at(error)}: {_first_line(error)} If it runs for real, "
            "it does something that has no model here; measure it on a GPU."
        ) from error
    finally:
        hook.remove()


def _at(error: BaseException) -> str:
    place = place_of(error)
    return f" ({place})" if place else ""


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "no message").rstrip(".")
    return f"{line}."


def _refuse_left_behind(optimizer: Any, *_: Any) -> None:
    """On a real GPU `model.to("cuda")` moves what an optimizer holds; a fake parameter is bound anew, and the optimizer keeps the old one."""
    if any(was_moved(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        raise PredictError(
            f"The {type(optimizer).__name__} was made before its model was moved to the GPU, and its parameters cannot be "
            "followed here. Move the model first, then make the optimizer."
        )


@contextlib.contextmanager
def _in_lists_of_tensors() -> Iterator[None]:
    """torch takes the operators on whole lists only for types that it knows by name: optimizers by default, and clipping, on a GPU."""
    with contextlib.ExitStack() as stack:
        for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            holder: Any = importlib.import_module(module)
            known = [*holder._foreach_supported_types, fake_tensor.FakeTensor]
            stack.enter_context(mock.patch.object(holder, "_foreach_supported_types", known))
        yield


@contextlib.contextmanager
def _visible(watch: GpuWatch) -> Iterator[None]:
    """`torch.cuda` says that there is one GPU, to all but torch itself, which would go and use it."""
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
            told = _to_others(getattr(torch.cuda, name), answer)
            stack.enter_context(mock.patch.object(torch.cuda, name, told))
        yield


def _to_others(original: Callable[..., Any], answer: Callable[[], Any]) -> Callable[..., Any]:
    def told(*args: Any, **kwargs: Any) -> Any:
        asker = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        return original(*args, **kwargs) if asker == "torch" else answer()

    return told
