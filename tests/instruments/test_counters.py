"""Operators and FLOPs of small programs are counted exactly; `quiet` restores garbage collection."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpc_core.instruments.allocations import StorageWatch
from hpc_core.instruments.clock import quiet, seconds_of, synchronize
from hpc_core.instruments.counters import counting
from hpc_core.instruments.machine import measure_canary, measure_ceilings

CPU = torch.device("cpu")
attention = torch.nn.functional.scaled_dot_product_attention


def test_operators_of_a_small_program_are_counted_by_name() -> None:
    """Each operator dispatched in the block counts once, views included."""
    left, right = torch.ones(3, 4), torch.ones(5, 4)
    left.add(1)
    with counting() as counts:
        (left @ right.t() + 1).relu_()
    assert counts.operators == {
        "aten.t.default": 1,
        "aten.mm.default": 1,
        "aten.add.Tensor": 1,
        "aten.relu_.default": 1,
    }
    assert counts.total == 4
    assert counts.flops == 2 * 3 * 4 * 5


def test_an_in_place_product_counts_as_a_product() -> None:
    """`addmm_`, which torch's own counter omits, counts like `addmm`."""
    left, right, sum_of = torch.ones(3, 4), torch.ones(4, 5), torch.ones(3, 5)
    for product in (sum_of.addmm, sum_of.addmm_):
        with counting() as counts:
            product(left, right)
        assert counts.flops == 2 * 3 * 4 * 5


def test_a_backward_is_counted_too() -> None:
    """A linear layer takes three products forward and backward, and two without an input gradient."""
    for needs, products in ((True, 3), (False, 2)):
        layer, inputs = torch.nn.Linear(6, 10, bias=False), torch.ones(7, 6, requires_grad=needs)
        with counting() as counts:
            layer(inputs).sum().backward()
        assert counts.flops == products * 2 * 7 * 6 * 10


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("width", [32, 16])
def test_fused_attention_is_counted_on_a_cpu(groups: int, width: int) -> None:
    """Attention takes two products per query head forward and five backward, also with fewer key heads."""
    query = torch.randn(2, 4, 9, width, requires_grad=True)
    key, value = (torch.randn(2, groups, 13, width, requires_grad=True) for _ in range(2))
    with counting() as forward:
        out = attention(query, key, value, enable_gqa=True)
    with counting() as backward:
        torch.autograd.backward(out.sum())
    assert any("flash_attention_for_cpu" in name for name in forward.operators)
    product = 2 * 2 * 4 * 9 * 13 * width
    assert (forward.flops, backward.flops) == (2 * product, 5 * product)


def test_the_causal_mask_halves_nothing() -> None:
    """Causal, masked and plain attention count alike, fused or not."""
    query = torch.randn(1, 2, 8, 16)
    masks: list[dict[str, Any]] = [{}, {"is_causal": True}, {"attn_mask": torch.ones(8, 8, dtype=torch.bool)}]
    flops = []
    for mask in masks:
        with counting() as counts:
            attention(query, query, query, **mask)
        flops.append(counts.flops)
    with counting() as counts:
        (query @ query.transpose(-1, -2)).softmax(-1) @ query
    assert {*flops, counts.flops} == {2 * 2 * 2 * 8 * 8 * 16}


@pytest.mark.parametrize("rows", [1, 5])
def test_four_bit_products_count_as_dense_ones(rows: int) -> None:
    """The fused product of a 4-bit weight counts like a dense one."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False
    layer = layer.to("cpu").eval().requires_grad_(False)
    with counting() as counts:
        layer(torch.randn(rows, 128))
    assert counts.flops == 2 * rows * 128 * 64


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_products_count_as_dense_ones(threshold: float) -> None:
    """bitsandbytes' int8 product counts like a dense one, with and without an outlier threshold."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False, threshold=threshold)
    rows, constants, _ = bnb.functional.int8_vectorwise_quant(torch.randn(64, 128, dtype=torch.float16))
    layer.weight = bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=constants)
    layer.eval()
    with counting() as counts:
        layer(torch.full((5, 128), 0.5, dtype=torch.float16))
    assert counts.flops == 2 * 5 * 128 * 64


def _raise_in_quiet() -> None:
    with quiet():
        assert not gc.isenabled()
        with quiet():
            pass
        assert not gc.isenabled()
        raise KeyError


@pytest.mark.parametrize("enabled", [True, False])
def test_quiet_leaves_garbage_collection_as_it_was(enabled: bool) -> None:
    """Garbage collection is off in the block and restored afterwards, even after an error."""
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyError):
            _raise_in_quiet()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_quiet_collects_before() -> None:
    """`quiet` collects garbage before the block."""
    import weakref

    class Cycle:
        pass

    cycle: Any = Cycle()
    cycle.me = cycle
    reference = weakref.ref(cycle)
    del cycle
    with quiet():
        assert reference() is None


def test_seconds_are_those_of_the_step() -> None:
    """A step takes at least as long as it sleeps."""
    synchronize(CPU)
    assert seconds_of(lambda: time.sleep(0.02), CPU) >= 0.02


def test_a_cpu_has_no_ceilings() -> None:
    """A CPU has no ceilings."""
    assert measure_ceilings(CPU) == {}


def test_the_canary_runs_on_a_cpu_too() -> None:
    """Both of its parts take time."""
    canary = measure_canary(CPU)
    assert set(canary) == {"compute", "memory"}
    assert all(seconds > 0 for seconds in canary.values())


def _compiled_step() -> tuple[Callable[[], torch.Tensor], Counter[str]]:
    """A compiled step, and how often its compiled code ran."""
    runs: Counter[str] = Counter()
    layer, inputs = torch.nn.Linear(6, 10, bias=False), torch.ones(7, 6)

    def counted_backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            runs["compiled"] += 1
            return graph.forward(*arguments)

        return run

    @torch.compile(backend=counted_backend)
    def step() -> torch.Tensor:
        output: torch.Tensor = layer(inputs)
        return output

    step()
    return step, runs


@pytest.mark.parametrize("watch", [counting, lambda: StorageWatch(["step"])], ids=["operators", "storages"])
def test_a_compiled_step_still_runs_compiled_after_it_was_watched(watch: Callable[[], Any]) -> None:
    """A dispatch mode counts the eager operators, and afterwards the compiled code runs again."""
    step, runs = _compiled_step()
    with watch() as watched:
        step()
    assert runs["compiled"] == 1
    operators = watched.operators.total() if hasattr(watched, "operators") else watched.uses.total()
    assert operators == 2  # a transpose and a product
    step()
    assert runs["compiled"] == 2
