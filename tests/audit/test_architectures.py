"""Facts hold for architectures that are not shaped like Llama, and show what is wrong with them."""

from __future__ import annotations

import pytest
import torch

from hpc_core.audit.parts import attention_modules, beside_text, decoder_layers, expert_modules
from hpc_core.builders.causal_lm import causal_lm
from hpc_core.case.shapes import MODELS, layers_key
from hpc_core.catalogue import finetune, lora, qlora
from hpc_core.catalogue.architectures import answer, lora_step
from hpc_core.catalogue.shorthand import model_of
from tests.audit.conftest import Run

pytestmark = pytest.mark.slow

_WITHOUT_ATTENTION = {"mamba2-2.7b": 0, "qwen3-next-80b-a3b": 1}
"""How many of four layers have attention, where not all have."""
_MIXTURES = {
    "mixtral-8x7b",
    "qwen3-30b-a3b",
    "olmoe-1b-7b",
    "deepseek-v2-lite",
    "gpt-oss-20b",
    "llama-4-scout",
    "qwen3-next-80b-a3b",
}


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"tiny"}))
def test_layers_attention_and_experts_are_found_in_every_architecture(name: str) -> None:
    """transformers' classes name the parts: as many layers as the configuration says, one attention each, experts in mixtures only."""
    spec = model_of(name, tiny=True)
    model = causal_lm(spec, torch.device("cpu"))
    config = spec.configuration()
    config = config.get("text_config", config)
    layers = decoder_layers(model)
    assert len(layers) == config[layers_key(config)]
    assert sum(len(attention_modules(layer)) for layer in layers) == _WITHOUT_ATTENTION.get(name, len(layers))
    assert bool(expert_modules(model)) == (name in _MIXTURES)
    assert bool(beside_text(model)) == (name == "gemma-3-4b")


@pytest.mark.parametrize("name", ["gpt2-xl", "pythia-6.9b", "falcon-7b", "bloom-7b1", "mamba2-2.7b", "gemma-2-9b"])
def test_a_step_of_a_model_not_shaped_like_llama_is_no_false_alarm(name: str, run: Run) -> None:
    """The record is valid: layers are not called `self_attn`, attention may have no fused kernel, or none may exist."""
    record = run(lora_step(name, tiny=True))
    assert record.reasons == ()
    assert record.audit["checkpointing"].seen == "off"


def test_a_routers_softmax_is_not_attention_and_experts_tokens_are_counted(run: Run) -> None:
    """A mixture's record is valid, holds the tokens of each expert, and marks its time as depending on them."""
    record = run(lora_step("mixtral-8x7b", tiny=True))
    assert record.reasons == ()
    assert record.audit["attention"].seen == "sdpa"
    tokens = record.metrics["expert_tokens"]
    assert tokens.samples is not None
    assert sum(tokens.samples) == 2 * 64 * 2 * 4  # rows, tokens, experts a token, layers
    assert record.metrics["expert_tokens_most"].value >= 64
    assert str(record.metrics["step_s"].note).startswith("depends on routing")
    assert record.metrics["operators"].note is None


def test_checkpointing_is_seen_whatever_layers_are_called(run: Run) -> None:
    """The checkpointing of GPT-NeoX's layers is observed."""
    record = run(lora_step("pythia-6.9b", tiny=True).vary("lora-gc", checkpointing="non-reentrant"))
    assert record.reasons == ()
    assert record.audit["checkpointing"].seen == "on"


def test_experts_that_nf4_leaves_alone_void_the_run(run: Run) -> None:
    """bitsandbytes quantizes linear layers only; the reason names the matrices that stayed as they were, with their share."""
    case = finetune(model_of("mixtral-8x7b", tiny=True), qlora(dropout=0.0), batch=2, length=32, steps=1)
    (reason,) = run(case).reasons
    assert "% of the matrix weights are not quantized: model.layers.*.mlp.experts.gate_up_proj" in reason


def test_the_layers_of_gpt2_are_quantized(run: Run) -> None:
    """transformers' Conv1D becomes Linear4bit, with the weights that were drawn, turned."""
    case = finetune(
        model_of("gpt2-xl", tiny=True), qlora(targets=("c_attn",), dropout=0.0), batch=2, length=32, steps=1
    )
    record = run(case)
    assert record.reasons == ()
    assert record.audit["quantized_share"].seen == "all"
    assert record.audit["trainable_parameters"].holds


def test_a_multimodal_model_is_measured_as_text_and_says_so(run: Run) -> None:
    """The note names what never runs and the adapters that never train; their missing gradients are no mismatch."""
    record = run(lora_step("gemma-3-4b", tiny=True))
    assert record.reasons == ()
    (note,) = [note for note in record.circumstances.notes if "multimodal" in note]
    assert "model.vision_tower and model.multi_modal_projector" in note
    assert "24 adapter tensors on them never train" in note


def test_a_cache_without_a_length_is_a_note(run: Run) -> None:
    """Mamba's cache holds states, not tokens: the fact is left out and noted, and the record is valid."""
    record = run(answer("mamba2-2.7b", tiny=True))
    assert record.reasons == ()
    assert "cache_length" not in record.audit
    assert any("cache_length could not be determined" in note for note in record.circumstances.notes)


def test_forcing_the_unfused_kernel_is_still_seen(run: Run) -> None:
    """Where torch has a fused kernel, the math implementation is a mismatch, as before."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forced(program: object) -> None:
        step = program.step  # type: ignore[attr-defined]

        def unfused(*arguments: object) -> None:
            with sdpa_kernel([SDPBackend.MATH]):
                step(*arguments)

        program.step = unfused  # type: ignore[attr-defined]

    case = finetune(model_of("qwen3-8b", tiny=True), lora(), batch=2, length=32, steps=1)
    assert any("unfused (math)" in reason for reason in run(case, program=forced).reasons)
