"""The engine's own kernels and its captured step, on a real GPU: the plain path's logits, the stock path's tokens, the graph's memory."""

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


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def first_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """One set of block sizes a product, since each costs a compilation: what is checked is what kernels give, not which is fastest."""
    _take_candidates(monkeypatch, slice(0, 1))


@functools.cache
def _every_candidate() -> Any:
    """The method as it is; first called before anything is put in its place."""
    from hpc_core.engines.decode.products import Product

    return Product.candidates


def _take_candidates(monkeypatch: pytest.MonkeyPatch, which: slice) -> None:
    from hpc_core.engines.decode.products import Product

    every = _every_candidate()
    monkeypatch.setattr(Product, "candidates", lambda product: every(product)[which])


def _built(device: torch.device, kind: str, dtype: str = "bfloat16", shape: str = "tiny", compute: str = "") -> Built:
    model = ModelSpec(shape=shape, dtype=dtype, seed=3, layers=None if shape == "tiny" else 2)  # type: ignore[arg-type]
    quantization = _QUANTIZATIONS[kind]
    if quantization is not None:  # the plain path multiplies in this type, whatever the model's
        quantization = msgspec.structs.replace(quantization, compute_dtype=compute or dtype)
    return build(generate(model, quantization=quantization, scale="tiny"), device)


def _logits(built: Built, make: Any, *, batch: int, padded: bool) -> torch.Tensor:
    """Of three steps after a prompt of 37, fed the same tokens whatever the step."""
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
    found = []
    with torch.no_grad():
        Prefill(decoder, cache, turns, PlainBetween())(ids, mask)
        step = make(decoder, cache, turns)
        step.settle()
        for tokens in fed:
            found.append(step(tokens).float().clone())
            cache.filled += 1
            cache.length += 1
    return torch.stack(found)


def _plain_step(decoder: Any, cache: Any, turns: Any) -> PlainStep:
    return PlainStep(decoder, cache, turns, decoder.head, eager=True)


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
    """Whatever the weights' format and the batch, and which launches begin early: within what bfloat16 rounds."""
    from hpc_core.engines.decode.kernel_step import KernelStep

    built = _built(device, kind)
    padded = batch > 1
    plain = _logits(built, _plain_step, batch=batch, padded=padded)
    seen = _logits(built, lambda *args: KernelStep(*args, int8_head=False, early=early), batch=batch, padded=padded)
    assert float((seen - plain).norm() / plain.norm()) < 2e-2


@pytest.mark.parametrize(("kind", "tensors"), [("nf4", 0), ("nf4-dq", 4 * 3)])
def test_kernels_keep_no_constants_of_their_own(device: torch.device, kind: str, tensors: int) -> None:
    """Those that are quantized again are read as they lie: of ours is an offset a matrix, for four launches of each of three layers."""
    from hpc_core.engines.decode.kernel_step import KernelStep

    decoder = decoder_of(_built(device, kind).model)
    cache = StaticKeyValues(decoder, 1, 64)
    owned = KernelStep(decoder, cache, decoder.turns(64), int8_head=False).owned_weights()
    assert len(owned) == tensors
    assert all(tensor.numel() <= 3 for tensor in owned)


def _prefilled(built: Built, between: Any, *, batch: int, padded: bool) -> list[torch.Tensor]:
    """Of a prompt of 37: last hidden states, and every real key and value of the last layer."""
    decoder = decoder_of(built.model)
    cache = StaticKeyValues(decoder, batch, 38)
    turns = decoder.turns(cache.capacity)
    ids = torch.randint(3, 1000, (batch, 37), generator=torch.Generator().manual_seed(5)).to(cache.filled.device)
    mask = torch.ones_like(ids)
    mask[0, : 11 * padded] = 0
    with torch.no_grad():
        last = Prefill(decoder, cache, turns, between(decoder, turns))(ids, mask if padded else None)
    kept = cache.layers[-1]
    return [last.float(), *(part[:, :, 11:37].float() for part in (kept.keys, kept.values))]


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
    """Norms, rotation, cache and gate by our launches, products and attention as they are: hidden states, keys and values."""
    from hpc_core.engines.decode.prefill_kernels import KernelBetween

    built = _built(device, kind, dtype, shape)
    plain = _prefilled(built, lambda *_: PlainBetween(), batch=batch, padded=padded)
    seen = _prefilled(built, KernelBetween, batch=batch, padded=padded)
    for ours, wanted in zip(seen, plain, strict=True):
        assert float((ours - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize(
    ("kind", "compute"),
    [("nf4", "bfloat16"), ("nf4-dq", "bfloat16"), ("fp4", "bfloat16"), ("nf4", "float32"), ("nf4-dq", "float16")],
)
def test_a_four_bit_product_in_pieces_is_the_layers_own(device: torch.device, kind: str, compute: str) -> None:
    """Of full width, few rows and many, computed in the model's type and in others: equal to the layer's within rounding, and never a whole matrix
    dequantized beside it.
    """
    from hpc_core.engines.decode.prefill import FourBit, prefill_product

    layer = decoder_of(_built(device, kind, shape="llama-3.2-3b", compute=compute).model).layers[0]
    for module in (layer.qkv[0], layer.gate_up[0], layer.down):
        for batch, tokens, piece in ((1, 3, 26), (1, 100, 26), (4, 100, 9), (4, 400, 9), (16, 500, 13)):
            product = prefill_product(module, torch.bfloat16, batch=batch)
            assert isinstance(product, FourBit)
            x = torch.randn(tokens, module.in_features, device=device, dtype=torch.bfloat16)
            with torch.no_grad():
                wanted = module(x).float()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                seen = product(x)
                took = torch.cuda.max_memory_allocated() - before
            assert float((seen.float() - wanted).norm() / wanted.norm()) < 1e-2
            # Beside a piece, `piece` MiB in two bytes a weight: x and a piece's columns in the type computed in, at most of twice the bytes.
            assert took < piece * 2 ** (21 if compute == "float32" else 20) + 3 * seen.nbytes + (
                0 if compute == "bfloat16" else 2 * x.nbytes
            )


@pytest.mark.parametrize(("kind", "batch", "temperature"), [("plain", 1, None), ("nf4", 5, None), ("plain", 5, 2.0)])
def test_a_captured_prefill_is_the_eager_one(
    device: torch.device, kind: str, batch: int, temperature: float | None
) -> None:
    """Prompt after prompt: the same logits, token, cache and counters; and who follows operators sees all of them."""
    built = _built(device, kind)
    workload = GenerateSpec(
        engine="graph", batch=batch, prompts=3, prompt_length=37, new_tokens=4, temperature=temperature
    )
    program = graph_program(built, workload)
    assert program.first_tokens.worth_capturing
    assert program.first_tokens.hidden_bytes > 0
    for index in (0, 1, 2, 0):
        seen = []
        for watched in (False, True):
            program.chooser.begin(index)
            with torch.no_grad():
                program.first_tokens(index, watched=watched)
            kept = program.cache.layers[-1].keys[:, :, :37].float()
            seen.append((program.first_tokens.logits.float().clone(), kept, program.chooser.tokens.clone()))
            assert (program.cache.length, int(program.cache.filled)) == (37, 37)
        for replayed, eager in zip(seen[0][:2], seen[1][:2], strict=True):
            assert float((replayed - eager).norm() / eager.norm()) < 1e-3
        assert torch.equal(seen[0][2], seen[1][2])
    with torch.no_grad(), counting() as counts:
        program.first_tokens(0, watched=False)
    assert counts.total > 30


def test_captured_prefills_of_padded_prompts_and_several_widths_keep_apart(device: torch.device) -> None:
    """Graphs that share their memory, replayed in another order than they were captured in: each gives its own prompt's logits, without the padding."""
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
            wanted = built.model(**inputs, position_ids=positions, use_cache=False).logits[:, -1]
        assert float((program.first_tokens.logits - wanted).norm() / wanted.norm()) < 1e-4
    assert program.first_tokens.all_replayed


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_captured_prefill_takes_what_an_eager_one_takes(device: torch.device, kind: str) -> None:
    """Two layers of full width under a batch: what the allocator saw of the eager one, cuBLAS's workspace included, is hidden in the graph."""
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
    assert abs(peaks[0] - peaks[1]) < 2 * 2**20  # of blocks that the allocator does not split
    assert program.first_tokens.hidden_bytes < 48 * 2**20


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_token_and_a_prefill_share_their_memory(device: torch.device, kernels: Any) -> None:
    """Graphs that never run at once take what the larger one takes: cuBLAS's workspace once, and a token's logits stay right after prompts."""
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
        ids = program.output[:, :-1]
        with torch.no_grad():
            wanted = built.model(ids, use_cache=False).logits[:, -1]
        assert float((program._logits - wanted).norm() / wanted.norm()) < 1e-4


def test_long_prompts_are_left_to_eager_prefills(device: torch.device) -> None:
    """They keep a GPU busy by themselves, and a graph would keep what they take."""
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
    """Tuning may choose any candidate. The last one for 4 bits looks codes up in memory where the others permute bytes."""
    from hpc_core.engines.decode.kernel_step import KernelStep

    _take_candidates(monkeypatch, slice(which, which + 1 or None))
    built = _built(device, kind)
    plain = _logits(built, _plain_step, batch=batch, padded=False)
    seen = _logits(built, lambda *args: KernelStep(*args, int8_head=False), batch=batch, padded=False)
    assert float((seen - plain).norm() / plain.norm()) < 2e-2


def test_tuning_takes_one_of_the_candidates(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two candidates each kind of product gets one, the same in all layers, and the record can say which and how fast."""
    from hpc_core.engines.decode.kernel_step import KernelStep

    _take_candidates(monkeypatch, slice(0, 2))
    decoder = decoder_of(_built(device, "plain").model)
    cache = StaticKeyValues(decoder, 1, 256)
    step = KernelStep(decoder, cache, decoder.turns(cache.capacity), int8_head=False)
    said = step.settle()
    assert set(said) == {"qkv", "output", "gate_up", "down", "head"}
    for name in ("qkv", "output", "gate_up", "down"):
        products = [layer[name] for layer in step._layers]
        assert len({product.blocks for product in products}) == 1
        assert products[0].blocks in products[0].candidates()
        assert said[name].startswith(products[0].blocks.text)
        assert said[name].endswith(" us")


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
    """Three heads a group, biases, widths that are no power of two; float32 to five digits."""
    from hpc_core.engines.decode.kernel_step import KernelStep

    built = _built(device, kind, dtype, shape)
    plain = _logits(built, _plain_step, batch=batch, padded=False)
    seen = _logits(built, lambda *args: KernelStep(*args, int8_head=False), batch=batch, padded=False)
    assert float((seen - plain).norm() / plain.norm()) < (1e-5 if dtype == "float32" else 2e-2)


# Inductor advises TF32 for products in float32, which are held against float32 here; torch 2.9 to 2.11 ask by a getter that warns itself.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32:UserWarning")
@pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32:UserWarning")
@pytest.mark.parametrize("kernels", ["triton", "torch", "inductor"])
def test_a_captured_step_answers_as_the_eager_one(device: torch.device, kernels: str) -> None:
    """Query after query the graph's tokens have logits within rounding of the best of the stock forward."""
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
    """A replay draws anew for each token, and a query draws the same when it comes again."""
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
    """A replay that fills and frees a gibibyte takes a gibibyte, though the allocator shows nothing after the capture."""
    kept = torch.zeros(1, device=device)

    def work() -> None:
        kept.copy_(torch.ones(_GIB // 4, device=device).sum().view(1))

    replay = captured(work, device, before=lambda: None)
    torch.cuda.reset_peak_memory_stats(device)
    resting = torch.cuda.memory_allocated(device)
    replay()
    torch.cuda.synchronize(device)
    assert float(kept) == _GIB // 4
    assert torch.cuda.max_memory_allocated(device) - resting < _GIB // 2
    assert replay.hidden_bytes >= _GIB
