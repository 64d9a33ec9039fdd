"""bitsandbytes on fake tensors: what cannot be made of them is made of plain parameters with the same bytes, and what its
registered fakes hide is brought to light.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hpc_core.builders import quantization
from hpc_core.builders.libraries import library
from hpc_core.case.errors import PredictError
from hpc_core.predict.outliers import Outliers
from hpc_core.record.gpus import Gpu

__all__ = ["CONSTANTS_FIRST", "OUTLIERS", "STAND_INS", "Launch", "fake_bitsandbytes"]

Launch = Callable[[str, int], None]
"""Called with what is launched, and in how many kernels."""


_MOST_ROWS = 1536
"""`_gemm_4bit_custom_max_m`: above so many rows bitsandbytes dequantizes and calls a plain product."""
_RULE = "_gemm_4bit_use_custom_cuda"
_NONZERO_KERNELS = 4
"""Two to count, one scan, one to select; seen on an H100 (CUB, torch 2.11)."""
OUTLIERS = Outliers()
"""Of the one model that a prediction's process builds."""


@contextlib.contextmanager
def fake_bitsandbytes() -> Iterator[None]:
    """Let `build.quantization` quantize fake weights.

    A `Params4bit` or `Int8Params` is made by `Tensor._make_subclass`, which refuses fake tensors. Its storage is what matters
    here: the packed weight, and a quantization state of fake tensors, on a plain parameter that carries the same attributes.
    """
    bnb = library("bitsandbytes", "Predicting a quantized case")
    made = bnb.nn.Linear4bit.__init__

    def make_real(self: Any, *args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():  # a placeholder on the meta device, whose subclass cannot wrap a fake tensor
            made(self, *args, **kwargs)

    made_8bit = bnb.nn.Linear8bitLt.__init__

    def make_real_8bit(self: Any, *args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():
            made_8bit(self, *args, **kwargs)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(bnb.nn.Linear4bit, "__init__", make_real))
        patches.enter_context(mock.patch.object(bnb.nn.Linear8bitLt, "__init__", make_real_8bit))
        patches.enter_context(mock.patch.object(quantization, "_four_bit", _four_bit))
        patches.enter_context(mock.patch.object(quantization, "_int8", _int8))
        # The code book of double quantization is computed on the host, value by value; only its size matters.
        patches.enter_context(mock.patch.object(bnb.functional, "create_dynamic_map", _code_book))
        patches.enter_context(mock.patch.dict(bnb.functional.name2qmap, clear=True))
        # Paged state: managed memory, by the driver and not by torch's allocator; torch sees a tensor of the host.
        patches.enter_context(mock.patch.object(bnb.functional, "get_paged", _paged))
        patches.enter_context(mock.patch.object(bnb.functional, "fill", _nothing))
        patches.enter_context(mock.patch.object(bnb.functional, "prefetch_tensor", _nothing))
        yield


def _paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor: Any = torch.empty(shape, dtype=dtype, device="cpu")
    tensor.is_paged, tensor.page_deviceid = True, device.index
    return tensor  # type: ignore[no-any-return]


def _nothing(*_: object, **__: object) -> None:
    """Calls into the CUDA library that no tensor comes of."""


def _code_book(*_: object, **__: object) -> torch.Tensor:
    return torch.empty(256)


def _four_bit(weight: torch.Tensor, module: Any) -> torch.nn.Parameter:
    bnb = library("bitsandbytes", "Predicting a quantized case")
    options = {name: value for name, value in module.weight.__dict__.items() if name != "quant_state"}
    packed, state = bnb.functional.quantize_4bit(
        weight.data,
        blocksize=options["blocksize"],
        compress_statistics=options["compress_statistics"],
        quant_type=options["quant_type"],
        quant_storage=options["quant_storage"],
    )
    parameter = torch.nn.Parameter(packed, requires_grad=False)
    for name, value in options.items():
        setattr(parameter, name, value)
    parameter.quant_state, parameter.bnb_quantized = state, True  # type: ignore[attr-defined]
    module.quant_state = state
    return parameter


def _int8(weight: torch.Tensor) -> torch.nn.Parameter:
    bnb = library("bitsandbytes", "Predicting a quantized case")
    rows, constants, _ = bnb.functional.int8_vectorwise_quant(weight.data.contiguous().to(torch.float16))
    parameter = torch.nn.Parameter(rows, requires_grad=False)
    parameter.CB, parameter.SCB, parameter.has_fp16_weights = rows, constants, False  # type: ignore[attr-defined]
    return parameter


def _gemm_4bit(gpu: Gpu, launch: Launch, **given: Any) -> torch.Tensor:
    """`gemm_4bit` of bitsandbytes 0.50 (backends/cuda/ops.py): one fused kernel where its rule says so, otherwise the block constants
    are dequantized if they are quantized too, then the weight, and a plain product follows.
    """
    a, shape, bias = given["A"], given["shapeB"], given.get("bias")
    rows, inner = a.numel() // a.shape[-1], a.shape[-1]
    if rows <= _MOST_ROWS and inner % given["blocksize"] == 0 and _rule(gpu)(0, a.dtype, rows, shape[0], inner):
        launch("gemm_4bit, fused", 1)
        return torch.empty((*a.shape[:-1], shape[0]), dtype=a.dtype, device=a.device)
    constants = given.get("absmax_8bit")
    if constants is not None:
        dequantized = torch.empty_like(constants, dtype=torch.float32)
        launch("gemm_4bit, constants", 1)
        absmax = dequantized + given["absmax_offset"]  # noqa: F841 - both live until the product is done
    weight = torch.empty(tuple(shape), dtype=a.dtype, device=a.device)
    launch("gemm_4bit, dequantizing", 1)
    return torch.nn.functional.linear(a, weight, bias)


def _int8_vectorwise_quant(gpu: Gpu, launch: Launch, **given: Any) -> tuple[torch.Tensor, ...]:
    """As backends/cuda/ops.py does it. How many columns hold outliers depends on the data: `OUTLIERS` knows what drawn weights give."""
    a, threshold = given["A"], given.get("threshold", 0.0)
    rows = a.numel() // a.shape[-1]
    row_stats = torch.empty(rows, device=a.device, dtype=torch.float32)
    out_row = torch.empty(a.shape, device=a.device, dtype=torch.int8)
    outlier_columns = None
    if threshold > 0.0:
        outliers = a.abs() >= threshold
        bool(outliers.any())
        outlier_columns = _outlier_columns(outliers, OUTLIERS.columns(rows, a.shape[-1], threshold), launch)
    launch("int8_vectorwise_quant", 1)
    if rows > 1 and outlier_columns is not None:
        out_row[:, outlier_columns] = 0
    return out_row, row_stats, outlier_columns  # type: ignore[return-value]


def _outlier_columns(outliers: torch.Tensor, count: int, launch: Launch) -> torch.Tensor:
    """`argwhere(outliers.any(dim=0)).view(-1)`, with so many found."""
    if not count:
        return torch.empty(0, device=outliers.device, dtype=torch.int64)
    hit = outliers.any(dim=0)
    hit[0].item()  # nonzero waits for their number
    launch("nonzero", _NONZERO_KERNELS)
    return torch.empty((count, 1), device=outliers.device, dtype=torch.int64).view(-1)


def _int8_mixed_scaled_mm(gpu: Gpu, launch: Launch, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As backends/default/ops.py and backends/cuda/ops.py do it: an integer product, its scaling, and the outliers' columns apart."""
    a, weight, columns = given["A"], given["CB"], given.get("outlier_cols")
    apart, dequantized = torch.empty(0, device=a.device, dtype=a.dtype), None
    if columns is not None and columns.numel():
        apart = a[:, columns].contiguous()
        taken = weight[:, columns].contiguous()
        dequantized = (taken * given["SCB"].view(-1, 1) * 7.874015718698502e-3).to(a.dtype).t()
    whole = torch.empty((*given["CA"].shape[:-1], weight.shape[0]), device=a.device, dtype=torch.int32)
    launch("int8 product", 1)
    scaled = torch.empty_like(whole, dtype=torch.float16)
    launch("int8_mm_dequant", 1)
    output = scaled.to(a.dtype)
    return output if dequantized is None else output.addmm(apart, dequantized), apart


STAND_INS: dict[str, Callable[..., Any]] = {
    "gemm_4bit": _gemm_4bit,
    "int8_vectorwise_quant": _int8_vectorwise_quant,
    "int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
}
"""What these operators do inside, where their registered fakes say less: they hide memory, or cannot be without data."""

CONSTANTS_FIRST = {"quantize_4bit", "quantize_blockwise"}
"""Operators that take memory for their constants before that for their first output."""


@functools.cache
def _rule(gpu: Gpu) -> Any:
    """bitsandbytes' own rule, lifted from its source: its module cannot be imported where its CUDA library is not."""
    found = importlib.util.find_spec("bitsandbytes")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "backends" / "cuda" / "ops.py"
    functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    rule = next((function for function in functions if function.name == _RULE), None)
    if rule is None:
        raise PredictError(
            f"bitsandbytes has no {_RULE} in {path.name} any more: which of its 4-bit kernels runs cannot be told. "
            "Prediction knows 0.50; install that, or predict unquantized cases only."
        )
    rule.decorator_list = []
    names: dict[str, Any] = {
        "torch": torch,
        "functools": functools,
        "_GEMM_4BIT_CUSTOM_FLOOR_M": 4,
        "_gpu_dispatch_props": lambda _: (gpu.multiprocessors, *gpu.capability),
    }
    exec(compile(ast.Module([rule], []), str(path), "exec"), names)  # noqa: S102 - an installed package's own code
    return names[_RULE]
