"""bitsandbytes on fake tensors.

`Params4bit` and `Int8Params` cannot wrap fake tensors, so plain parameters with the same bytes stand in for them. The fake
versions of bitsandbytes' operators hide memory and kernels; the stand-ins here allocate and launch what the real ones do.

LLM.int8 multiplies every column that holds an activation of 6 or more outside the int8 product (Dettmers et al., LLM.int8(),
2022). How many columns that is depends on the data. With weights drawn from a normal distribution it can be computed: a norm's
output is standard normal and reaches 6 once in 5e8 numbers, so no column is affected. The input of `down_proj` is silu(gate)
times up, each normal with deviation STD * sqrt(hidden size), and often reaches 6.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from hpc_core.builders import quantization
from hpc_core.builders.causal_lm import STD
from hpc_core.case.errors import PredictError, library
from hpc_core.record.gpus import Gpu

Launch = Callable[[str, int], None]
"""Called with a name and the number of kernels launched."""

_MOST_ROWS = 1536
"""`_gemm_4bit_custom_max_m`: with more rows bitsandbytes dequantizes and calls a plain matrix product."""
_RULE = "_gemm_4bit_use_custom_cuda"
_NONZERO_KERNELS = 4
"""Two count, one scans, one selects. Measured on an H100 (CUB, torch 2.11)."""


_QUANTILES = 2000
"""Quantiles per factor, which makes four million equally likely pairs of a gate and an up value."""


def share_beyond(threshold: float, deviation: float) -> float:
    """Return the share of silu(gate) * up with a magnitude of at least `threshold`, for normal gate and up of this standard deviation."""
    normal = NormalDist(0, deviation)
    values = np.array([normal.inv_cdf((number + 0.5) / _QUANTILES) for number in range(_QUANTILES)])
    gate = values / (1 + np.exp(-values))
    return float(np.mean(np.abs(np.outer(gate, values)) >= threshold))


def expected_columns(rows: int, columns: int, share: float) -> int:
    """Return how many of the columns are expected to hold at least one outlier, if each number is one with probability `share`."""
    return round(columns * -math.expm1(rows * math.log1p(-share)))


class Outliers:
    """Track which layer is running and how many outlier columns its input has."""

    def __init__(self) -> None:
        self._deviation: float | None = None
        self._shares: dict[tuple[float, float], float] = {}

    def watch(self, model: torch.nn.Module, hidden_size: int) -> None:
        """Register hooks that notice when a `down_proj` of this model, with its drawn weights, is running."""
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == "down_proj":
                module.register_forward_pre_hook(self._entered(STD * math.sqrt(hidden_size)))
                module.register_forward_hook(self._left)

    def columns(self, rows: int, columns: int, threshold: float) -> int:
        """Return how many columns of the running layer's (rows, columns) input are outliers."""
        if self._deviation is None:
            return 0
        key = (threshold, self._deviation)
        if key not in self._shares:
            self._shares[key] = share_beyond(*key)
        return expected_columns(rows, columns, self._shares[key])

    def _entered(self, deviation: float) -> Any:
        def enter(*_: Any) -> None:
            self._deviation = deviation

        return enter

    def _left(self, *_: Any) -> None:
        self._deviation = None


OUTLIERS = Outliers()
"""The outliers of the one model that a prediction process builds."""


@contextlib.contextmanager
def fake_bitsandbytes() -> Iterator[None]:
    """Let `builders.quantization` quantize fake weights.

    `Params4bit` and `Int8Params` are made by `Tensor._make_subclass`, which refuses fake tensors. Only their storage matters
    here: the packed weight and the quantization state, on a plain parameter with the same attributes.
    """
    bnb = library("bitsandbytes", "Predicting a quantized case")
    made = bnb.nn.Linear4bit.__init__

    def make_real(self: Any, *args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():  # its placeholder on the meta device cannot wrap a fake tensor
            made(self, *args, **kwargs)

    made_8bit = bnb.nn.Linear8bitLt.__init__

    def make_real_8bit(self: Any, *args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():
            made_8bit(self, *args, **kwargs)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(bnb.nn.Linear4bit, "__init__", make_real))
        patches.enter_context(mock.patch.object(bnb.nn.Linear8bitLt, "__init__", make_real_8bit))
        patches.enter_context(mock.patch.object(bnb.nn.Params4bit, "__new__", _params_4bit(bnb.nn.Params4bit.__new__)))
        patches.enter_context(mock.patch.object(quantization, "_four_bit", _four_bit))
        patches.enter_context(mock.patch.object(quantization, "_int8", _int8))
        # Double quantization computes its code book on the host, value by value. Only its size matters.
        patches.enter_context(mock.patch.object(bnb.functional, "create_dynamic_map", _code_book))
        patches.enter_context(mock.patch.dict(bnb.functional.name2qmap, clear=True))
        # Paged state lives in managed memory, outside torch's allocator; torch sees a host tensor.
        patches.enter_context(mock.patch.object(bnb.functional, "get_paged", _paged))
        patches.enter_context(mock.patch.object(bnb.functional, "fill", _nothing))
        patches.enter_context(mock.patch.object(bnb.functional, "prefetch_tensor", _nothing))
        yield


def _paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor: Any = torch.empty(shape, dtype=dtype, device="cpu")
    tensor.is_paged, tensor.page_deviceid = True, device.index
    return tensor  # type: ignore[no-any-return]


def _nothing(*_: object, **__: object) -> None:
    """Stand in for CUDA library calls that return no tensor."""


def _code_book(*_: object, **__: object) -> torch.Tensor:
    return torch.empty(256)


def _params_4bit(original: Any) -> Any:
    """Quantize what `from_pretrained` loads onto the fake GPU: it makes a `Params4bit`, which quantizes when it is moved there."""

    def new(cls: Any, data: Any = None, requires_grad: bool = False, **options: Any) -> Any:
        if isinstance(data, FakeTensor) and data.fake_device.type == "cuda" and not options.get("bnb_quantized"):
            return _quantized(data, _OPTIONS | options, options.get("module"))
        return original(cls, data, requires_grad, **options)

    return new


_OPTIONS = {"blocksize": 64, "compress_statistics": True, "quant_type": "fp4", "quant_storage": torch.uint8}
"""Defaults of `Params4bit`."""


def _four_bit(weight: torch.Tensor, module: Any) -> torch.nn.Parameter:
    return _quantized(weight, module.weight.__dict__, module)


def _quantized(weight: torch.Tensor, given: dict[str, Any], module: Any) -> torch.nn.Parameter:
    bnb = library("bitsandbytes", "Predicting a quantized case")
    options = {name: value for name, value in given.items() if name != "quant_state"}
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
    if module is not None:
        module.quant_state = state
    return parameter


def _int8(weight: torch.Tensor) -> torch.nn.Parameter:
    bnb = library("bitsandbytes", "Predicting a quantized case")
    rows, constants, _ = bnb.functional.int8_vectorwise_quant(weight.data.contiguous().to(torch.float16))
    parameter = torch.nn.Parameter(rows, requires_grad=False)
    parameter.CB, parameter.SCB, parameter.has_fp16_weights = rows, constants, False  # type: ignore[attr-defined]
    return parameter


def _gemm_4bit(gpu: Gpu, launch: Launch, **given: Any) -> torch.Tensor:
    """Do what `gemm_4bit` of bitsandbytes 0.50 does (backends/cuda/ops.py).

    Where its rule allows, that is one fused kernel. Otherwise it dequantizes the block constants (if they are quantized too),
    then the weight, and calls a plain matrix product.
    """
    a, shape, bias = given["A"], given["shapeB"], given.get("bias")
    rows, inner = a.numel() // a.shape[-1], a.shape[-1]
    if (
        rows <= _MOST_ROWS
        and inner % given["blocksize"] == 0
        and _rule(gpu.multiprocessors, gpu.capability)(0, a.dtype, rows, shape[0], inner)
    ):
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
    """Do what backends/cuda/ops.py does, with the expected number of outlier columns."""
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
    """Do what `argwhere(outliers.any(dim=0)).view(-1)` does when it finds `count` columns."""
    if not count:
        return torch.empty(0, device=outliers.device, dtype=torch.int64)
    hit = outliers.any(dim=0)
    hit[0].item()  # nonzero waits for the count
    launch("nonzero", _NONZERO_KERNELS)
    return torch.empty((count, 1), device=outliers.device, dtype=torch.int64).view(-1)


def _int8_mixed_scaled_mm(gpu: Gpu, launch: Launch, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what backends/default/ops.py and backends/cuda/ops.py do: an int8 product, its scaling, and a product of the outlier columns."""
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
"""Operators whose registered fake versions hide memory or need data, and what they really do."""

CONSTANTS_FIRST = {"quantize_4bit", "quantize_blockwise"}
"""Operators that allocate their constants before their first output."""


@functools.cache
def _rule(multiprocessors: int, capability: tuple[int, int]) -> Any:
    """Take bitsandbytes' own rule from its source: the module cannot be imported without its CUDA library."""
    found = importlib.util.find_spec("bitsandbytes")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "backends" / "cuda" / "ops.py"
    functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    rule = next((function for function in functions if function.name == _RULE), None)
    if rule is None:
        raise PredictError(
            f"bitsandbytes no longer has {_RULE} in {path.name}, so the 4-bit kernel that would run is unknown. "
            "Prediction supports 0.50: install that version, or predict unquantized cases only."
        )
    rule.decorator_list = []
    names: dict[str, Any] = {
        "torch": torch,
        "functools": functools,
        "_GEMM_4BIT_CUSTOM_FLOOR_M": 4,
        "_gpu_dispatch_props": lambda _: (multiprocessors, *capability),
    }
    exec(compile(ast.Module([rule], []), str(path), "exec"), names)  # noqa: S102 - an installed package's own code
    return names[_RULE]
