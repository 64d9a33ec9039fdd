"""What a step of the user's own may do with the value of a fake tensor, which has none: write it down, but not decide by it.

`item()` gives a number that can be added up, kept and printed. Whatever asks it to choose a way (`if`, `<`, `range`), or asks a
tensor for all its values, is refused by name and place: which way real data would take is not known here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from hpc_core.case.errors import PredictError

__all__ = ["Unknown", "place_of", "values_are_unknown"]

_OURS = ("torch", "hpc_core", "unittest", "contextlib")
_MASKING = "transformers.masking_utils"


def _ours(module: str) -> bool:
    return module.partition(".")[0] in _OURS


def place_of(error: BaseException) -> str:
    """Where the user's code was when this was raised, as "file.py:12"; empty if it was not there."""
    found, at = "", error.__traceback__
    while at is not None:
        if not _ours(str(at.tb_frame.f_globals.get("__name__", ""))):
            found = f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"
        at = at.tb_next
    return found


def _asker() -> Any:
    """The frame that asks: the nearest one that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _ours(str(frame.f_globals.get("__name__", ""))):
        frame = frame.f_back
    return frame


def _refuse(what: str) -> NoReturn:
    frame = _asker()
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    if frame.f_globals.get("__name__") == _MASKING:
        raise PredictError(
            f"transformers asks whether the padding mask leaves everything in ({place}), and a prediction has no values. "
            "Leave attention_mask out where nothing is padded, or measure the case on a GPU."
        )
    raise PredictError(
        f"{place} {what}: a prediction has no values, so it cannot know which way real data would go. Take that out "
        "of the step, or measure it on a GPU."
    )


class Unknown(float):
    """The number that a fake tensor gives. Arithmetic gives another, text says "unknown", and nothing can be decided by it."""

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


def _asked_for_one_sequence() -> bool:
    """transformers looks for several sequences packed into a row, by positions; those that it made itself are in order."""
    frame = _asker()
    return bool(frame.f_globals.get("__name__") == _MASKING and frame.f_code.co_name.startswith("find_packed_sequence"))


@contextlib.contextmanager
def values_are_unknown() -> Iterator[None]:
    """While active, fake tensors answer questions for their values as this module says; real tensors answer as ever."""
    with contextlib.ExitStack() as stack:

        def instead(name: str, answer: Callable[..., Any]) -> None:
            original = getattr(torch.Tensor, name)

            def asked(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if not isinstance(self, FakeTensor):
                    return original(self, *args, **kwargs)
                return answer(original, self, *args, **kwargs)

            stack.enter_context(mock.patch.object(torch.Tensor, name, asked))

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
    original(tensor)  # the copy from the GPU, which is waited for, is an operator of the step
    return Unknown(1.0)


def _truth(original: Any, tensor: Any) -> bool:
    if _asked_for_one_sequence():
        original(tensor)
        return True
    _refuse("decides by the value of a tensor")


def _text(original: Any, tensor: Any, spec: str) -> str:
    return format(tensor.detach().item(), spec) if tensor.dim() == 0 else object.__format__(tensor, spec)


def _list(tensor: Any) -> NoReturn:
    _refuse("makes a list of the values of a tensor")
