"""The number of kernels launched and the attention chosen follow ATen's rules, which are written here a second time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.case.errors import PredictError
from hpc_core.predict.attention import chosen
from hpc_core.predict.kernels import Launches, multi_tensor_launches, product_kernels
from hpc_core.predict.strides import with_real_strides
from hpc_core.record.gpus import GPUS, Gpu

ROOT = Path(__file__).parents[2]
CUDNN = "_scaled_dot_product_cudnn_attention"
CHUNK, BLOCKS = 65536, 320
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
SIZES = st.lists(
    st.one_of(st.integers(0, 3 * CHUNK), st.integers(0, 400 * CHUNK), st.sampled_from([CHUNK, BLOCKS * CHUNK])),
    max_size=130,
)
DEPTHS = st.integers(1, 5)


def _simulated(sizes: list[int], depth: int) -> int:
    """`multi_tensor_apply` of ATen/native/cuda/MultiTensorApply.cuh, line by line."""
    launches = 0
    n_tensors = len(sizes)
    loc_block_info = loc_tensor_info = 0
    numel_for_tensor: dict[int, int] = {}
    for t in range(n_tensors):
        if sizes[t] == 0:
            continue
        numel_for_tensor[loc_tensor_info] = sizes[t]
        loc_tensor_info += 1
        chunks = (sizes[t] + CHUNK - 1) // CHUNK
        for chunk in range(chunks):
            loc_block_info += 1
            tensors_full = loc_tensor_info == TENSORS[depth] and chunk == chunks - 1
            blocks_full = loc_block_info == BLOCKS
            if tensors_full or blocks_full:
                launches += 1
                loc_block_info = 0
                if chunk == chunks - 1:
                    loc_tensor_info = 0
                else:
                    numel_for_tensor[0] = numel_for_tensor[loc_tensor_info - 1]
                    loc_tensor_info = 1
    if loc_block_info != 0:
        launches += 1
    return launches


@given(SIZES, DEPTHS)
def test_launches_over_lists_equal_those_of_atens_loop(sizes: list[int], depth: int) -> None:
    """The launches equal those of ATen's loop for any sizes, even empty tensors and tensors larger than a launch."""
    assert multi_tensor_launches(sizes, depth) == _simulated(sizes, depth)


def test_examples_of_launches() -> None:
    """Nothing launches nothing, 36 tensors fit in one launch of a fused Adam, and 320 chunks fill one."""
    assert multi_tensor_launches([], 4) == multi_tensor_launches([0, 0], 4) == 0
    assert multi_tensor_launches([1] * 36, 4) == 1
    assert multi_tensor_launches([1] * 37, 4) == 2
    assert multi_tensor_launches([BLOCKS * CHUNK], 4) == 1
    assert multi_tensor_launches([BLOCKS * CHUNK + 1], 4) == 2


SHAPES = st.lists(st.sampled_from([1, 1, 2, 3, 4]), min_size=1, max_size=5)


@given(SHAPES, st.randoms(use_true_random=False))
def test_views_have_the_strides_of_real_ones(shape: list[int], random: Any) -> None:
    """A view onto a shape with dimensions of one has the strides of a real tensor, whatever the fake reports."""
    order = random.sample(range(len(shape)), len(shape))
    source = torch.arange(torch.Size(shape).numel()).view(shape).permute(order)
    shape_of_view = [size for size in source.shape if size != 1 or random.random() < 0.5]
    for _ in range(random.randint(0, 2)):
        shape_of_view.insert(random.randint(0, len(shape_of_view)), 1)
    expected = source.view(shape_of_view)  # only dimensions of one are added or removed, so this is always a view
    fake = expected.as_strided(expected.shape, [7 if size == 1 else step for size, step in _steps(expected)])
    out = with_real_strides("view", [source], fake)
    assert (out.shape, out.stride(), out.data_ptr()) == (expected.shape, expected.stride(), source.data_ptr())
    assert torch.equal(out, expected)


def _steps(tensor: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(tensor.shape, tensor.stride(), strict=True))


def test_other_operators_keep_their_outputs() -> None:
    """An output that is not a view, or has no dimension of one, is returned unchanged."""
    source, out = torch.ones(2, 3), torch.ones(1, 6)
    assert with_real_strides("mm", [source], out) is out
    whole = source.view(6)
    assert with_real_strides("view", [source], whole) is whole


def test_cudnns_attention_returns_the_layout_of_its_query() -> None:
    """An output of cuDNN's attention has the strides of its query; an output of another width keeps its own."""
    query = torch.ones(2, 5, 3, 8).transpose(1, 2)
    out, rest = torch.ones(2, 3, 5, 8), torch.ones(1)
    assert with_real_strides(CUDNN, [query], (out, rest))[0].stride() == query.stride()
    narrow = torch.ones(2, 3, 5, 4)
    assert with_real_strides(CUDNN, [query], (narrow, rest))[0] is narrow


HOPPER, ADA, BLACKWELL = GPUS["H100 80GB HBM3"], GPUS["RTX 4090"], GPUS["RTX 5090"]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TABLE = [
    # gpu, dtype, width, mask, grouped, kernel
    (HOPPER, BF16, 128, None, False, "cudnn"),
    (HOPPER, BF16, 128, None, True, "cudnn"),
    (HOPPER, F16, 128, "bool", True, "cudnn"),
    (HOPPER, BF16, 128, "trained", False, "efficient"),
    (HOPPER, BF16, 128, "trained", True, "math"),
    (HOPPER, BF16, 264, None, False, "efficient"),
    (HOPPER, F32, 128, None, False, "efficient"),
    (HOPPER, F32, 128, None, True, "math"),
    (HOPPER, F32, 100, None, False, "efficient"),
    (HOPPER, F32, 102, None, False, "math"),
    (ADA, BF16, 128, None, False, "flash"),
    (ADA, BF16, 128, None, True, "flash"),
    (ADA, BF16, 128, "bool", False, "efficient"),
    (ADA, F16, 128, "bool", True, "math"),
    (ADA, F32, 128, None, False, "efficient"),
    (ADA, F32, 128, None, True, "math"),
    (BLACKWELL, BF16, 128, None, True, "flash"),
    (BLACKWELL, BF16, 128, "bool", False, "efficient"),
]


@pytest.mark.parametrize(("gpu", "dtype", "width", "mask", "grouped", "kernel"), TABLE)
def test_the_attention_kernel_is_the_one_that_torch_chooses(
    gpu: Gpu, dtype: torch.dtype, width: int, mask: str | None, grouped: bool, kernel: str
) -> None:
    """Kind of GPU, dtype, head width, mask and grouped heads choose the kernel as torch does."""
    assert chosen(gpu, *_heads(dtype, width, grouped), _mask(mask, dtype), grouped=grouped) == kernel


@pytest.mark.parametrize(
    ("gpu", "dtype", "heads", "key_heads", "width", "value_width", "kernel"),
    [
        (HOPPER, BF16, 16, 16, 192, 128, "cudnn"),  # DeepSeek
        (ADA, BF16, 16, 16, 192, 128, "efficient"),
        (GPUS["B200"], BF16, 16, 16, 192, 128, "cudnn"),
        (GPUS["B200"], BF16, 8, 8, 256, 256, "flash"),
        (HOPPER, BF16, 71, 1, 64, 64, "math"),  # Falcon
        (ADA, BF16, 71, 1, 64, 64, "math"),
        (GPUS["Tesla T4"], BF16, 8, 8, 128, 128, "math"),
        (GPUS["Tesla T4"], F16, 8, 8, 128, 128, "efficient"),
        (GPUS["MI300X"], BF16, 8, 8, 128, 128, "flash"),
    ],
)
def test_heads_of_other_architectures_get_torchs_kernel(
    gpu: Gpu, dtype: torch.dtype, heads: int, key_heads: int, width: int, value_width: int, kernel: str
) -> None:
    """Values narrower than keys, keys that are broadcast without grouping, and dtypes that an old card lacks."""
    query, key = torch.ones(1, heads, 4, width, dtype=dtype), torch.ones(1, key_heads, 4, width, dtype=dtype)
    value = torch.ones(1, key_heads, 4, value_width, dtype=dtype)
    assert chosen(gpu, query, key, value, None, grouped=False) == kernel


def test_heads_that_flash_attention_pads_are_refused() -> None:
    """A head width that is no multiple of 8 is refused: flash attention pads it in copies that are not modelled."""
    with pytest.raises(PredictError, match="A head width of 100"):
        chosen(ADA, *_heads(BF16, 100, False), None, grouped=False)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "trained"])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_chosen_kernel_supports_its_inputs(gpu: Gpu, dtype: torch.dtype, mask: str | None, grouped: bool) -> None:
    """Flash and cuDNN need half precision, flash takes no mask, and the memory-efficient kernels take no grouped heads."""
    kernel = chosen(gpu, *_heads(dtype, 128, grouped), _mask(mask, dtype), grouped=grouped)
    assert kernel not in ("flash", "cudnn") or dtype != F32
    assert kernel != "flash" or mask is None
    assert kernel != "efficient" or not grouped
    assert (kernel == "cudnn") == (gpu.capability in ((9, 0), (10, 0)) and dtype != F32 and mask != "trained")


def _heads(dtype: torch.dtype, width: int, grouped: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys = torch.empty(2, 2 if grouped else 4, 16, width, dtype=dtype)
    return torch.empty(2, 4, 16, width, dtype=dtype), keys, keys.clone()


def _mask(kind: str | None, dtype: torch.dtype) -> torch.Tensor | None:
    if kind is None:
        return None
    return (
        torch.ones(16, 16, dtype=torch.bool) if kind == "bool" else torch.ones(16, 16, dtype=dtype, requires_grad=True)
    )


@pytest.mark.parametrize(
    ("shape", "layout", "kernels"),
    [
        ((1, 3072, 3072), "nt", 2),  # a decoded token: split
        ((1, 3072, 8192), "nt", 1),
        ((1024, 3072, 3072), "nt", 1),
        ((2048, 3072, 8), "nt", 2),  # LoRA's A
        ((2048, 8, 3072), "nt", 1),  # and its B
        ((8192, 4096, 8192), "tn", 1),  # a full weight's gradient, which is not in the table
    ],
)
def test_a_product_launches_the_kernels_that_an_h100_launched(
    shape: tuple[int, int, int], layout: str, kernels: int
) -> None:
    """The kernels of a product are looked up by sizes and layout, in bfloat16 as in float16."""
    rows, inner, columns = shape
    for dtype in (torch.bfloat16, torch.float16):
        left = torch.empty(rows, inner, dtype=dtype, device="meta")
        right = torch.empty(inner, columns, dtype=dtype, device="meta")
        if layout[0] == "t":
            left = left.t().contiguous().t()
        if layout[1] == "t":
            right = right.t().contiguous().t()
        assert product_kernels(left, right) == kernels


@given(st.integers(1, 5000), st.integers(1, 20000), st.integers(1, 200000))
def test_any_product_has_kernels(rows: int, inner: int, columns: int) -> None:
    """An unmeasured size takes its nearest neighbour's count: one, two with a sum, three with a scaling too."""
    left = torch.empty(rows, inner, dtype=torch.bfloat16, device="meta")
    assert product_kernels(left, torch.empty(columns, inner, dtype=torch.bfloat16, device="meta").t()) in (1, 2, 3)


def test_cudnn_attention_of_one_query_launches_what_an_h100_launched() -> None:
    """For each shape measured without a mask, the rule gives the number of kernels that an H100 launched."""
    measured = json.loads((ROOT / "bench" / "studies" / "prediction" / "attention-h100.json").read_bytes())
    rows = [dict(zip(measured["columns"], row, strict=True)) for row in measured["rows"]]
    unmasked = [row for row in rows if not row["mask"]]
    assert len(unmasked) > 200
    for row in unmasked:
        query = torch.empty(row["batch"], row["query_heads"], row["queries"], row["width"], device="meta")
        key = torch.empty(row["batch"], row["key_heads"], row["keys"], row["width"], device="meta")
        launches = Launches()
        launches.add(torch.ops.aten._scaled_dot_product_cudnn_attention.default, CUDNN, (query, key), [query, key], [])
        assert launches.kernels == row["kernels"], row
