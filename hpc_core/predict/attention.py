"""Which kernels torch's scaled dot product attention uses on a GPU, and the operator it then dispatches.

A CPU build lacks the CUDA half of `_fused_sdp_choice`, so this module makes the choice of ATen/native/transformers/cuda/sdp_utils.cpp:
in the order of `priority_order`, with each backend's conditions as far as dense decoder attention can meet or fail them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hpc_core.case.errors import PredictError
from hpc_core.record.gpus import Gpu

_HALF = (torch.float16, torch.bfloat16)
_MOST_WIDTH = 256
"""Largest head width of the flash kernels (`check_head_dim_size_flash`)."""


def chosen(
    gpu: Gpu, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, grouped: bool
) -> str:
    """Return "cudnn", "flash", "efficient" or "math" for (batch, heads, length, width) tensors.

    `grouped` is `enable_gqa` with fewer key heads than query heads. The flash and cuDNN kernels support it. The memory-efficient
    ones do not (`check_batch_size_and_num_heads_dense` with `supports_gqa=false`): with torch 2.11, grouped float32 attention
    was measured to use explicit matrix products. No fused kernel broadcasts keys that have fewer heads without `enable_gqa`
    (Falcon), and none supports bfloat16 below compute capability 8.0 (T4).

    Raises:
        PredictError: flash attention would pad the head width.
    """
    allowed = torch.backends.cuda  # what `torch.nn.attention.sdpa_kernel` leaves enabled
    fits_heads = grouped or query.shape[-3] == key.shape[-3]
    half = fits_heads and query.dtype in _HALF and gpu.capability >= (8, 0)
    learned_mask = mask is not None and mask.requires_grad
    if (
        half
        and gpu.prefers_cudnn_attention
        and allowed.cudnn_sdp_enabled()
        and _cudnn_widths(gpu, query.shape[-1], value.shape[-1])
        and key.shape[-2] > 1
        and not learned_mask
    ):
        return "cudnn"
    width = query.shape[-1]
    if half and mask is None and allowed.flash_sdp_enabled() and width == value.shape[-1] and width <= _MOST_WIDTH:
        if width % 8:
            raise PredictError(
                f"A head width of {width} cannot be predicted: flash attention pads it to a multiple of 8. Measure the case on a GPU."
            )
        return "flash"
    alignment = 8 if query.dtype in _HALF else 4
    aligned = width % alignment == 0 and value.shape[-1] % alignment == 0
    has_dtype = query.dtype != torch.bfloat16 or gpu.capability >= (8, 0)
    if fits_heads and not grouped and aligned and has_dtype and allowed.mem_efficient_sdp_enabled():
        return "efficient"
    return "math"


def _cudnn_widths(gpu: Gpu, width: int, value_width: int) -> bool:
    """Return what `check_cudnn_tensor_shapes` does, with cuDNN 9.11 or newer. The widths of keys and values may differ (DeepSeek)."""
    most = 256 if gpu.capability == (9, 0) else 192 if (width, value_width) == (192, 128) else 128
    return max(width, value_width) <= most and width % 8 == 0 and value_width % 8 == 0


class Attention:
    """Replacement for `torch.nn.functional.scaled_dot_product_attention`."""

    def __init__(self, gpu: Gpu):
        self._gpu = gpu

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Dispatch the operator that ATen/native/transformers/attention.cpp would, for (batch, heads, length, width) tensors."""
        grouped = enable_gqa and key.shape[-3] != query.shape[-3]
        how = chosen(self._gpu, query, key, value, attn_mask, grouped=grouped)
        aten: Any = torch.ops.aten
        trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if how == "math":
            return _math(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        mask = _added(attn_mask, query)
        if how == "cudnn":
            heads = query.shape[-3]
            bias = None if mask is None else mask.expand(query.shape[0], heads, query.shape[-2], key.shape[-2])
            found = aten._scaled_dot_product_cudnn_attention(
                query, key, value, bias, trains, dropout_p, is_causal, False, scale=scale
            )
        elif how == "flash":
            found = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )
        else:
            found = aten._scaled_dot_product_efficient_attention(
                query, key, value, _padded(mask, query, key), trains, dropout_p, is_causal, scale=scale
            )
        out: torch.Tensor = found[0]
        return out


def _added(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """Convert a boolean mask to one that is added to the scores, as `convert_boolean_attn_mask` does."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros((), dtype=query.dtype, device=query.device)
    lowest = torch.full((), -math.inf, dtype=query.dtype, device=query.device)
    return torch.where(mask, zeros, lowest)


def _padded(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Align the mask's rows to 16 numbers and expand it to the scores, as `preprocess_mask` does for the memory-efficient kernels."""
    if mask is None:
        return None
    length = mask.shape[-1]
    if length % 16:
        mask = torch.nn.functional.pad(mask, (0, 16 - length % 16))[..., :length]
    return mask.expand(query.shape[0], query.shape[-3], query.shape[-2], key.shape[-2])


def _math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    aten: Any = torch.ops.aten
    out: torch.Tensor = aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out
