"""Families of kernels, with names recorded on an H100."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.instruments.kernels import FAMILIES, families_of, family

NAMES = {
    "nvjet_sm90_hsh_64x8_64x16_4x1_v_bz_splitK_TNT": "gemm",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __half, float, __half, false, float>": "gemm",
    "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize32x32x8_stage3_warpsize1x2x1_ffma_aligna4_a": "gemm",
    "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64_8x5_nt_align1>(cutlass_80_simt_sgemm": "gemm",
    "void gemmSN_TN_kernel<float, 128, 16, 2, 4, 10, 11, true, cublasGemvTensorStridedBatched<float": "gemm",
    "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, float, float, float": "gemm",
    "void kgemm_4bit_inference_naive<__nv_bfloat16, 128, 16>(int, int, int, __nv_bfloat16*": "gemm",
    "sgemm_largek_lds64": "gemm",
    "triton_tem_fused_mm_3": "gemm",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4, false, cutlass::bfloat16_t": "attention",
    "fmha_cutlassF_f32_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_cga1x1x1": "attention",
    "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, MulFunctor": "elementwise",
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<CUDAFunctor_add<float>": "elementwise",
    "void at::native::(anonymous namespace)::fused_dropout_kernel_vec<float, float, unsigned int, 1, 4, bool>": "elementwise",
    "triton_poi_fused_add_mul_0": "elementwise",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)": "copy",
    "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIter": "copy",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::(anonymous namespace)::Opaque": "copy",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float": "reduction",
    "triton_red_fused_mean_pow_1": "reduction",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>": "norm",
    "_rms_norm_forward_kernel": "norm",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)"
    "::FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor": "optimizer",
    "void kOptimizerStatic8bit2StateBlockwise<__nv_bfloat16, 0, 256, 1>(__nv_bfloat16*": "optimizer",
    "void kPreconditionOptimizer32bit2State<float, 0, 4096, 8>(float*": "optimizer",
    "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*, float*": "quantization",
    "void kInt8VectorQuant<__half, 1024, 0>(__half*, signed char*, float*, float, int, int)": "quantization",
    "void kdequant_mm_int32_fp16<4, 512>(int*, float*, float*, __half*, __half*, int, int, int)": "quantization",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, LogSoftMax": "softmax",
    "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float": "softmax",
    "void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long, unsigned int": "indexing",
    "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel": "indexing",
    "void at::native::vectorized_gather_kernel<16, long>": "indexing",
    "spin_kernel(long)": "other",
    "a_kernel_of_somebody": "other",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items(), ids=lambda text: text[:40])
def test_real_names_fall_into_their_family(name: str, expected: str) -> None:
    """Each kernel belongs to the family in which a reader would look for it."""
    assert family(name) == expected


@given(st.dictionaries(st.sampled_from(sorted(NAMES)), st.tuples(st.floats(0, 10), st.integers(1, 999))))
def test_families_add_up_to_the_whole(kernels: dict[str, tuple[float, int]]) -> None:
    """Families add up to all seconds and launches, and the longest comes first."""
    seconds = {name: value for name, (value, _) in kernels.items()}
    counts = {name: count for name, (_, count) in kernels.items()}
    families = families_of(seconds, counts)
    assert set(families) <= set(FAMILIES)
    assert sum(value for value, _ in families.values()) == pytest.approx(sum(seconds.values()))
    assert sum(count for _, count in families.values()) == sum(counts.values())
    assert [value for value, _ in families.values()] == sorted((value for value, _ in families.values()), reverse=True)
