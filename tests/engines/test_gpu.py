"""The graph engine's kernels and captured step on a real GPU: logits, tokens and memory."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import pytest
import torch

from hpc_core.builders.assemble import Built, build
from hpc_core.builders.data.rows import PromptBatch
from hpc_core.case.parts import ModelSpec, QuantSpec
from hpc_core.case.workloads import GenerateSpec
from hpc_core.catalogue import generate
from hpc_core.engines.capture import captured, forget_workspaces
from hpc_core.engines.decode.cache import StaticKeyValues
from hpc_core.engines.decode.model import decoder_of
from hpc_core.engines.decode.plain_step import PlainStep
from hpc_core.engines.decode.prefill import PlainBetween, Prefill
from hpc_core.engines.decode.program import GraphProgram, graph_program
from hpc_core.instruments.counters import counting
from tests.engines.conftest import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU to run kernels on"),
]
_GIB = 2**30
_QUANTIZATIONS = {
    "plain": None,
    "nf4": QuantSpec(kind="nf4", compute_dtype="bfloat16"),
    "nf4-dq": QuantSpec(kind="nf4", compute_dtype="bfloat16", double_quant=True),
    "fp4": QuantSpec(kind="fp4", compute_dtype="bfloat16"),
}


@pytest.fixture(autouse=True)
def first_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one candidate of block sizes per product, since each costs a compilation."""
    _limit_candidates(monkeypatch, slice(0, 1))


@functools.cache
def _every_candidate() -> Any:
    """The original method; called before it is replaced."""
    from hpc_core.engines.decode.products import Product

    return Product.candidates


def _limit_candidates(monkeypatch: pytest.MonkeyPatch, which: slice) -> None:
    from hpc_core.engines.decode.products import Product

    every = _every_candidate()
    monkeypatch.setattr(Product, "candidates", lambda product: every(product)[which])


def _built(device: torch.device, kind: str, dtype: str = "bfloat16", shape: str = "tiny", compute: str = "") -> Built:
    model = ModelSpec(shape=shape, dtype=dtype, seed=3, layers=None if shape == "tiny" else 2)  # type: ignore[arg-type]
    quantization = _QUANTIZATIONS[kind]
    if quantization is not None:  # the plain path multiplies in this type
        quantization = msgspec.structs.replace(quantization, compute_dtype=compute or dtype)
    return build(generate(model, quantization=quantization, scale="tiny"), device)


def _logits(built: Built, make: Any, *, batch: int, padded: bool) -> torch.Tensor:
    """Logits of three steps, fed the same tokens, after a prompt of 37."""
    decoder = decoder_of(built.model)
    cache = StaticKeyValues(decoder, batch, 256)
    turns = decoder.turns(cache.capacity)
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 1000, (batch, 37), generator=draw).to(cache.filled.device)
    fed = torch.randint(3, 1000, (3, batch), generator=draw).to(cache.filled.device)
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :11] = 0
    logits = []
    with torch.no_grad():
        Prefill(decoder, cache, turns, PlainBetween())(ids, mask)
        step = make(decoder, cache, turns)
        step.settle()
        for tokens in fed:
            logits.append(step(tokens).float().clone())
            cache.filled += 1
            cache.length += 1
    return torch.stack(logits)


def _error_of_kernels(built: Built, *, batch: int, padded: bool = False, early: Any = None) -> float:
    """The relative error of the kernels' logits, by those of the plain path."""
    from hpc_core.engines.decode.kernel_step import KernelStep

    def plain_step(decoder: Any, cache: Any, turns: Any) -> PlainStep:
        return PlainStep(decoder, cache, turns, decoder.head, eager=True)

    def kernel_step(*arguments: Any) -> KernelStep:
        return KernelStep(*arguments, int8_head=False, early=early)

    plain = _logits(built, plain_step, batch=batch, padded=padded)
    return relative_error(_logits(built, kernel_step, batch=batch, padded=padded), plain)


@pytest.mark.parametrize(
    ("kind", "batch", "early"),
    [
        *((kind, batch, None) for kind in _QUANTIZATIONS for batch in (1, 3, 9, 17)),
        *(
            (kind, batch, early)
            for kind, batch in (("plain", 1), ("nf4", 1), ("plain", 17))
            for early in ("all", "small", "none")
        ),
    ],
)
def test_kernels_give_the_plain_paths_logits(device: torch.device, kind: str, batch: int, early: Any) -> None:
    """The kernels give the plain path's logits up to bfloat16's rounding, for every weight format, batch and early launch."""
    assert _error_of_kernels(_built(device, kind), batch=batch, padded=batch > 1, early=early) < 2e-2


@pytest.mark.parametrize(("kind", "tensors"), [("nf4", 0), ("nf4-dq", 4 * 3)])
def test_kernels_keep_no_constants_of_their_own(device: torch.device, kind: str, tensors: int) -> None:
    """Constants that are quantized again are read in place; ours is one offset per matrix."""
    from hpc_core.engines.decode.kernel_step import KernelStep

    decoder = decoder_of(_built(device, kind).model)
    cache = StaticKeyValues(decoder, 1, 64)
    owned = KernelStep(decoder, cache, decoder.turns(64), int8_head=False).owned_weights()
    assert len(owned) == tensors
    assert all(tensor.numel() <= 3 for tensor in owned)


def _prefilled(built: Built, between: Any, *, batch: int, padded: bool) -> list[torch.Tensor]:
    """After a prompt of 37: last hidden states, and the last layer's keys and values of real tokens."""
    decoder = decoder_of(built.model)
    cache = StaticKeyValues(decoder, batch, 38)
    turns = decoder.turns(cache.capacity)
    ids = torch.randint(3, 1000, (batch, 37), generator=torch.Generator().manual_seed(5)).to(cache.filled.device)
    mask = torch.ones_like(ids)
    mask[0, : 11 * padded] = 0
    with torch.no_grad():
        last = Prefill(decoder, cache, turns, between(decoder, turns))(ids, mask if padded else None)
    layer = cache.layers[-1]
    return [last.float(), *(part[:, :, 11:37].float() for part in (layer.keys, layer.values))]


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "tolerance"),
    [
        ("plain", "tiny", "float32", 1e-5),
        ("nf4", "tiny", "float32", 1e-5),
        *((kind, "tiny", "bfloat16", 2e-2) for kind in _QUANTIZATIONS),
        ("nf4", "llama-3.2-3b", "bfloat16", 2e-2),
        ("plain", "qwen2.5-1.5b", "float16", 2e-2),
        ("nf4-dq", "qwen2.5-1.5b", "bfloat16", 2e-2),
    ],
)
@pytest.mark.parametrize(("batch", "padded"), [(1, False), (5, True), (32, False)])
def test_a_prefill_by_kernels_is_the_plain_one(
    device: torch.device, kind: str, shape: str, dtype: str, tolerance: float, batch: int, padded: bool
) -> None:
    """A prefill by kernels gives the plain one's hidden states, keys and values."""
    from hpc_core.engines.decode.prefill_kernels import KernelBetween

    built = _built(device, kind, dtype, shape)
    plain = _prefilled(built, lambda *_: PlainBetween(), batch=batch, padded=padded)
    by_kernels = _prefilled(built, KernelBetween, batch=batch, padded=padded)
    for computed, expected in zip(by_kernels, plain, strict=True):
        assert relative_error(computed, expected) < tolerance


@pytest.mark.parametrize(
    ("kind", "compute"),
    [("nf4", "bfloat16"), ("nf4-dq", "bfloat16"), ("fp4", "bfloat16"), ("nf4", "float32"), ("nf4-dq", "float16")],
)
def test_a_four_bit_product_in_pieces_is_the_layers_own(device: torch.device, kind: str, compute: str) -> None:
    """A product in pieces equals the layer's up to rounding, without a whole dequantized matrix."""
    from hpc_core.engines.decode.prefill import FourBit, prefill_product

    layer = decoder_of(_built(device, kind, shape="llama-3.2-3b", compute=compute).model).layers[0]
    for module in (layer.qkv[0], layer.gate_up[0], layer.down):
        for batch, tokens, piece in ((1, 3, 26), (1, 100, 26), (4, 100, 9), (4, 400, 9), (16, 500, 13)):
            product = prefill_product(module, torch.bfloat16, batch=batch)
            assert isinstance(product, FourBit)
            x = torch.randn(tokens, module.in_features, device=device, dtype=torch.bfloat16)
            with torch.no_grad():
                expected = module(x).float()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                output = product(x)
                allocated = torch.cuda.max_memory_allocated() - before
            assert relative_error(output, expected) < 1e-2
            # Beside a piece of `piece` MiB in 16 bits: x and a piece's columns in the compute dtype, at most twice the bytes.
            piece_bytes = piece * 2 ** (21 if compute == "float32" else 20)
            assert allocated < piece_bytes + 3 * output.nbytes + (0 if compute == "bfloat16" else 2 * x.nbytes)


@pytest.mark.parametrize(("kind", "batch", "temperature"), [("plain", 1, None), ("nf4", 5, None), ("plain", 5, 2.0)])
def test_a_captured_prefill_is_the_eager_one(
    device: torch.device, kind: str, batch: int, temperature: float | None
) -> None:
    """A captured prefill gives the eager one's logits, token, cache and counters; a counter of operators sees all of them."""
    built = _built(device, kind)
    workload = GenerateSpec(
        engine="graph", batch=batch, prompts=3, prompt_length=37, new_tokens=4, temperature=temperature
    )
    program = graph_program(built, workload)
    assert program.first_tokens.worth_capturing
    assert program.first_tokens.hidden_bytes > 0
    for index in (0, 1, 2, 0):
        results = []
        for watched in (False, True):
            program.chooser.begin(index)
            with torch.no_grad():
                program.first_tokens(index, watched=watched)
            keys = program.cache.layers[-1].keys[:, :, :37].float()
            results.append((program.first_tokens.logits.float().clone(), keys, program.chooser.tokens.clone()))
            assert (program.cache.length, int(program.cache.filled)) == (37, 37)
        for replayed, eager in zip(results[0][:2], results[1][:2], strict=True):
            assert relative_error(replayed, eager) < 1e-3
        assert torch.equal(results[0][2], results[1][2])
    with torch.no_grad(), counting() as counts:
        program.first_tokens(0, watched=False)
    assert counts.total > 30


def test_captured_prefills_share_memory_without_mixing(device: torch.device) -> None:
    """Graphs of several widths that share memory, replayed in any order, each give their own prompt's logits."""
    built = _built(device, "plain", "float32")
    draw = torch.Generator().manual_seed(3)
    prompts = []
    for width, padding in ((37, 11), (20, 0), (29, 5)):
        ids = torch.randint(3, 1000, (3, width), generator=draw).tolist()
        mask = [[0] * padding + [1] * (width - padding), [1] * width, [1] * width]
        prompts.append(PromptBatch(ids, mask if padding else None, 3 * width - padding, padding))
    program = GraphProgram(built, GenerateSpec(engine="graph", batch=3, prompts=3, new_tokens=4), prompts)
    assert program.first_tokens.worth_capturing
    assert program.first_tokens.hidden_bytes > 0
    for index in (2, 0, 1, 0):
        program.steps_done = index
        program.step()
        inputs = program.inputs[index]
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        program._begin(index)
        with torch.no_grad():
            expected = built.model(**inputs, position_ids=positions, use_cache=False).logits[:, -1]
        assert relative_error(program.first_tokens.logits, expected) < 1e-4
    assert program.first_tokens.all_replayed


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_captured_prefill_takes_what_an_eager_one_takes(device: torch.device, kind: str) -> None:
    """A captured prefill's hidden memory is what the allocator counts for the eager one, cuBLAS's workspace included."""
    built = _built(device, kind, shape="llama-3.2-3b")
    program = graph_program(
        built, GenerateSpec(engine="graph", batch=8, prompts=2, prompt_length=100, new_tokens=4, kernels="triton")
    )
    peaks = []
    for watched in (True, False):
        forget_workspaces()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            program.first_tokens(0, watched=watched)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() + (0 if watched else program.first_tokens.hidden_bytes))
    assert abs(peaks[0] - peaks[1]) < 2 * 2**20  # the allocator does not split some blocks
    assert program.first_tokens.hidden_bytes < 48 * 2**20


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_token_and_a_prefill_share_their_memory(device: torch.device, kernels: Any) -> None:
    """The two graphs, which never run at once, take what the larger one takes, and a token's logits stay right."""
    built = _built(device, "plain", "float32")
    program = graph_program(
        built, GenerateSpec(engine="graph", batch=2, prompts=3, prompt_length=37, new_tokens=4, kernels=kernels)
    )
    assert program.captured is not None
    pools = program.captured.hidden_bytes, program.first_tokens.hidden_bytes
    assert program.hidden_bytes == max(pools) < sum(pools)
    for index in (0, 2, 1):
        program.steps_done = index
        program.step()
        assert program.output is not None
        assert program._logits is not None
        ids = program.output[:, :-1]
        with torch.no_grad():
            expected = built.model(ids, use_cache=False).logits[:, -1]
        assert relative_error(program._logits, expected) < 1e-4


def test_prefills_of_long_prompts_are_not_captured(device: torch.device) -> None:
    """Long prompts keep a GPU busy without a graph, so their prefill is not captured."""
    program = graph_program(
        _built(device, "plain"), GenerateSpec(engine="graph", prompts=1, prompt_length=3000, new_tokens=4)
    )
    assert not program.first_tokens.worth_capturing
    assert program.first_tokens.hidden_bytes == 0
    program.step()
    assert program.replays == 3
    assert not program.first_tokens.replayed


@pytest.mark.parametrize(
    ("kind", "batch", "which"),
    [("plain", 1, -1), ("nf4", 1, -1), *(("nf4", batch, which) for batch in (3, 20) for which in range(6))],
)
def test_other_block_sizes_compute_the_same(
    device: torch.device, kind: str, batch: int, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every candidate of block sizes gives the plain path's logits."""
    _limit_candidates(monkeypatch, slice(which, which + 1 or None))
    assert _error_of_kernels(_built(device, kind), batch=batch) < 2e-2


def test_tuning_takes_one_of_the_candidates(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning chooses one candidate for each kind of product, the same in all layers, and reports it with its time."""
    from hpc_core.engines.decode.kernel_step import KernelStep

    _limit_candidates(monkeypatch, slice(0, 2))
    decoder = decoder_of(_built(device, "plain").model)
    cache = StaticKeyValues(decoder, 1, 256)
    step = KernelStep(decoder, cache, decoder.turns(cache.capacity), int8_head=False)
    report = step.settle()
    assert set(report) == {"qkv", "output", "gate_up", "down", "head"}
    for name in ("qkv", "output", "gate_up", "down"):
        products = [layer[name] for layer in step._layers]
        assert len({product.blocks for product in products}) == 1
        assert products[0].blocks in products[0].candidates()
        assert report[name].startswith(products[0].blocks.text)
        assert report[name].endswith(" us")


@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "batch"),
    [
        ("llama-3.2-3b", "bfloat16", "plain", 1),
        ("qwen2.5-1.5b", "float16", "plain", 1),
        ("qwen2.5-1.5b", "float16", "nf4", 5),
        ("tiny", "float32", "plain", 1),
        ("tiny", "float32", "nf4", 5),
    ],
)
def test_kernels_take_other_shapes_and_dtypes(
    device: torch.device, shape: str, dtype: str, kind: str, batch: int
) -> None:
    """Kernels support three heads per group, biases, other widths and other dtypes."""
    built = _built(device, kind, dtype, shape)
    assert _error_of_kernels(built, batch=batch) < (1e-5 if dtype == "float32" else 2e-2)


# Inductor advises TF32 for float32 products, which this test needs exact; in torch 2.9 to 2.11 its check warns itself.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32:UserWarning")
@pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32:UserWarning")
@pytest.mark.parametrize("kernels", ["triton", "torch", "inductor"])
def test_a_captured_step_answers_as_the_eager_one(device: torch.device, kernels: str) -> None:
    """Each token of the graph is among the stock forward's best, up to rounding."""
    built = _built(device, "plain", "float32")
    workload = GenerateSpec(engine="graph", kernels=kernels, prompts=2, prompt_length=9, new_tokens=12)  # type: ignore[arg-type]
    program = graph_program(built, workload)
    assert program.captured is not None
    for _ in range(3):
        index = program.steps_done % program.period
        program.step()
        ids = program.inputs[index]["input_ids"]
        assert program.output is not None
        with torch.no_grad():
            logits = built.model(input_ids=program.output[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
        chosen = logits.gather(-1, program.output[:, ids.shape[1] :].unsqueeze(-1)).squeeze(-1)
        assert float((logits.amax(-1) - chosen).max()) < 1e-3 * float(logits.abs().max())


def test_sampling_in_a_graph_follows_its_seed(device: torch.device) -> None:
    """A replay draws anew for each token, and a repeated query draws the same tokens."""
    built = _built(device, "plain")
    workload = GenerateSpec(engine="graph", prompts=1, prompt_length=9, new_tokens=24, temperature=5.0)
    program = graph_program(built, workload, seed=3)
    drawn = []
    for _ in range(2):
        program.step()
        drawn.append(program.answer_ids())
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0][0])) > 12


def test_a_graphs_temporary_is_counted(device: torch.device) -> None:
    """A captured temporary of one GiB is counted, although the allocator shows nothing after the capture."""
    result = torch.zeros(1, device=device)

    def work() -> None:
        result.copy_(torch.ones(_GIB // 4, device=device).sum().view(1))

    replay = captured(work, device, before=lambda: None)
    torch.cuda.reset_peak_memory_stats(device)
    before_replay = torch.cuda.memory_allocated(device)
    replay()
    torch.cuda.synchronize(device)
    assert float(result) == _GIB // 4
    assert torch.cuda.max_memory_allocated(device) - before_replay < _GIB // 2
    assert replay.hidden_bytes >= _GIB
