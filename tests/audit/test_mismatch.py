"""A fact that is made untrue, in the model or in what runs, makes the record INVALID and is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpc_core.audit.model import linear_layers
from hpc_core.case.case import Case
from hpc_core.case.parts import QuantSpec
from hpc_core.catalogue import finetune, generate, lora, qlora, tiny
from hpc_core.engines.finetune import make_optimizer
from hpc_core.record.record import Record
from tests.audit.conftest import Change, Run
from tests.tiny_cases import TINY_CASES

_short: dict[str, Any] = {"batch": 2, "length": 16, "steps": 2}
LORA = finetune(tiny, lora(), **_short)
CHECKPOINTED = LORA.vary("lora-gc", checkpointing="non-reentrant")
QLORA = finetune(tiny, qlora(), **_short)
NF4 = QuantSpec(kind="nf4", compute_dtype="bfloat16")
ANSWER = generate(tiny, prompts=1, prompt_length=9, new_tokens=6)
NF4_ANSWER = ANSWER.vary("generate-nf4", quantization=NF4)


def _assert_mismatch(record: Record, fact: str, asked: Any, seen: Any) -> None:
    assert record.status == "invalid"
    assert (record.audit[fact].asked, record.audit[fact].seen) == (asked, seen)
    assert f"{fact}: asked for {asked!r}, saw {seen!r}." in record.reasons


def _layers(model: Any) -> list[Any]:
    return [layer for name, layer in linear_layers(model).items() if not name.endswith("lm_head")]


def _replace_one_layer(model: Any) -> None:
    name = next(iter(linear_layers(model)))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, torch.nn.Linear(128, 128, bias=False, dtype=torch.bfloat16))
    model.requires_grad_(False)


def _compute_in_float32(model: Any) -> None:
    for layer in _layers(model):
        layer.compute_dtype = torch.float32


def _widen_norms(model: Any) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.float()
            module.register_forward_hook(lambda *call: call[2].bfloat16())


def _widen_constants(model: Any) -> None:
    for layer in _layers(model):
        layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.double()


def _freeze_one_adapter_weight(model: Any) -> None:
    name, parameter = next((name, part) for name, part in model.named_parameters() if part.requires_grad)
    assert name.endswith("layers.0.self_attn.q_proj.lora_A.default.weight")
    parameter.requires_grad_(False)


def _train_embedding(model: Any) -> None:
    model.get_input_embeddings().weight.requires_grad_(True)


def _disable_dropout(model: Any) -> None:
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default"):
            module.p = 0.0


def _enable_grad(model: Any) -> None:
    def enable(*_: Any) -> None:
        torch.set_grad_enabled(True)  # generate's own no_grad restores it when it ends

    model.register_forward_pre_hook(enable)


def _transpose(model: Any) -> None:
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data.T.contiguous().T


_FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
_NAMES = sorted(f"{target}_proj.lora_{half}" for target in "kqvo" for half in "AB")
_EMBEDDING = "base_model.model.model.embed_tokens.weight"


def _convert_adapter(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()


def _checkpoint(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


MODELS: list[tuple[str, Case, Change, Any, Any]] = [
    ("quantized_layers", NF4_ANSWER, _replace_one_layer, 21, "20; model.layers.0.self_attn.q_proj is not"),
    ("compute_dtype", NF4_ANSWER, _compute_in_float32, ["bfloat16"], ["float32"]),
    ("quantized_bytes", NF4_ANSWER, _widen_constants, 250176, 250176 + 4 * 6912),
    ("norm_dtype", LORA, _widen_norms, ["bfloat16"], ["float32"]),
    ("adapter_dtype", LORA, _convert_adapter, ["float32"], ["bfloat16"]),
    ("trainable_parameters", LORA, _freeze_one_adapter_weight, 21504, 21504 - 8 * 128),
    ("trainable_names", LORA, _train_embedding, _NAMES, [_EMBEDDING, *_NAMES]),
    ("dropout", LORA, _disable_dropout, [0.05], [0.0]),
    ("checkpointing", LORA, _checkpoint, "off", "on"),
    ("checkpointing", CHECKPOINTED, lambda model: model.gradient_checkpointing_disable(), "on", "off"),
    ("autograd", ANSWER, _enable_grad, "off", "on"),
    ("weight_layout", ANSWER, _transpose, "row by row", "model.layers.1.mlp.down_proj.weight with strides (1, 128)"),
]


@pytest.mark.parametrize(
    ("fact", "case", "change", "asked", "seen"), MODELS, ids=[f"{fact}-{case.id}" for fact, case, *_ in MODELS]
)
def test_a_changed_model_voids_the_run(fact: str, case: Case, change: Change, asked: Any, seen: Any, run: Run) -> None:
    """A model that was changed after it was built fails the fact."""
    _assert_mismatch(run(case, model=change), fact, asked, seen)


@pytest.mark.parametrize(
    ("fact", "module"), [("embedding_dtype", "get_input_embeddings"), ("head_dtype", "get_output_embeddings")]
)
def test_a_float32_embedding_or_head_voids_the_run(fact: str, module: str, run: Run) -> None:
    """A float32 embedding or head in a bfloat16 model fails its fact."""

    def widen(model: Any) -> None:
        weight = getattr(model, module)().weight
        weight.data = weight.data.float()
        model.get_input_embeddings().register_forward_hook(lambda *call: call[2].bfloat16())
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))

    _assert_mismatch(run(ANSWER, model=widen), fact, "bfloat16", "float32")


def test_fp4_for_nf4_and_unwanted_double_quantization_void_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that were quantized in another way fail the facts of quantization."""
    from hpc_core.builders.quantization import quantize

    other = QuantSpec(kind="fp4", compute_dtype="bfloat16", double_quant=True)
    monkeypatch.setattr("hpc_core.builders.assemble.quantize", lambda model, _, device: quantize(model, other, device))
    record = run(NF4_ANSWER)
    _assert_mismatch(record, "quantization", ["nf4"], ["fp4"])
    _assert_mismatch(record, "double_quantization", [False], [True])


def test_a_skipped_quantization_voids_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without any quantized layer fails the fact `quantized_layers`."""
    monkeypatch.setattr("hpc_core.builders.assemble.quantize", lambda *_: None)
    record = run(QLORA)
    _assert_mismatch(record, "quantized_layers", 21, "0; base_model.model.model.layers.0.self_attn.q_proj is not")


def test_a_prepare_that_casts_nothing_voids_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `prepare`, norms and embeddings that are not float32 fail their facts."""
    monkeypatch.setattr("hpc_core.builders.assemble.prepare_for_training", lambda model, _: model.requires_grad_(False))
    record = run(QLORA.vary("qlora-prepare", prepare=True))
    _assert_mismatch(record, "norm_dtype", ["float32"], ["bfloat16"])
    _assert_mismatch(record, "embedding_dtype", "float32", "bfloat16")


def test_the_other_kind_of_checkpointing_voids_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reentrant checkpointing in place of the other kind fails `checkpointing_kind` alone."""
    from hpc_core.builders.assemble import enable_checkpointing

    monkeypatch.setattr(
        "hpc_core.builders.assemble.enable_checkpointing",
        lambda model, _, **more: enable_checkpointing(model, "reentrant", **more),
    )
    record = run(CHECKPOINTED)
    _assert_mismatch(record, "checkpointing_kind", "non-reentrant", "reentrant")
    assert len(record.reasons) == 1


def _half_labels(program: Any) -> None:
    for batch in program.batches:
        batch.labels[:, ::2] = -100


def _foreach(program: Any) -> None:
    program.optimizer = make_optimizer(
        LORA.vary("x", optimizer="adamw-foreach").workload,  # type: ignore[arg-type]
        [part for part in program.model.parameters() if part.requires_grad],
    )


def _wide_moments(program: Any) -> None:
    """Convert the first moments to float64 after each step, and back before the next."""

    def convert(dtype: torch.dtype) -> Callable[..., None]:
        def convert_moments(*_: Any) -> None:
            for state in program.optimizer.state.values():
                state["exp_avg"] = state["exp_avg"].to(dtype)

        return convert_moments

    program.optimizer.register_step_post_hook(convert(torch.float64))
    program.optimizer.register_step_pre_hook(convert(torch.float32))


def _first_adapter_weight(program: Any) -> Any:
    return dict(program.model.named_parameters())[_FIRST]


def _zero_gradient(program: Any) -> None:
    _first_adapter_weight(program).register_hook(lambda gradient: gradient * 0)


def _drop_gradient(program: Any) -> None:
    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    _first_adapter_weight(program).register_post_accumulate_grad_hook(drop)


STEPS: list[tuple[str, Change, Any, Any]] = [
    ("training_mode", lambda program: program.model.eval(), "on", "off in 168 of 168 modules"),
    ("trained_tokens", _half_labels, 64, 32),
    ("batch", _half_labels, "2 x 16 ids, 32 labels, 0 masked", "2 x 16 ids, 16 labels, 0 masked"),
    ("autocast", lambda program: setattr(program, "_autocast", True), ["off"], ["bfloat16"]),
    ("optimizer", _foreach, "adamw-fused", "adamw-foreach"),
    ("optimizer_state_dtype", _wide_moments, ["float32"], ["float32", "float64"]),
    ("gradients", _zero_gradient, "24 of 24 reached", f"23 of 24 reached; {_FIRST} is zero"),
    ("gradients", _drop_gradient, "24 of 24 reached", f"23 of 24 reached; {_FIRST} has none"),
]


@pytest.mark.parametrize(("fact", "change", "asked", "seen"), STEPS)
def test_a_changed_step_voids_the_run(fact: str, change: Change, asked: Any, seen: Any, run: Run) -> None:
    """A training program that was changed before its first step fails the fact."""
    _assert_mismatch(run(LORA, program=change), fact, asked, seen)


def test_a_dropped_padding_mask_voids_the_run(run: Run) -> None:
    """If the model attends to padding, `padded_tokens` fails."""

    def unmask(program: Any) -> None:
        for batch in program.batches:
            batch.mask.fill_(1)

    record = run(TINY_CASES["tiny/lora-max-length"], program=unmask)
    asked = record.metrics["padded_tokens"].value
    assert asked > 0
    _assert_mismatch(record, "padded_tokens", asked, 0)
    assert record.audit["batch"].seen.endswith(" 0 masked")


@pytest.mark.parametrize("case", [LORA, ANSWER], ids=lambda case: case.kind)
@pytest.mark.parametrize(
    ("change", "seen"), [("eager", "eager"), ("math", "sdpa, unfused (math)")], ids=["eager", "math"]
)
def test_attention_that_is_not_fused_voids_the_run(case: Case, change: str, seen: str, run: Run) -> None:
    """Eager attention and torch's unfused sdpa fail the fact `attention` alone."""
    if change == "math":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            record = run(case)
    else:
        record = run(case, model=lambda model: setattr(model.config, "_attn_implementation", "eager"))
    _assert_mismatch(record, "attention", "sdpa", seen)
    assert len(record.reasons) == 1


def _other_options(**more: Any) -> Change:
    def change(program: Any) -> None:
        generate = program.model.generate
        program.model.generate = lambda **options: generate(**{**options, **more})

    return change


def _longer_cache(program: Any) -> None:
    def longer(_: Any, __: Any, output: Any) -> None:
        for layer in output.past_key_values.layers:
            layer.keys = torch.cat([layer.keys, layer.keys[:, :, -1:]], dim=2)
            layer.values = torch.cat([layer.values, layer.values[:, :, -1:]], dim=2)

    program.model.register_forward_hook(longer)


def _shorter_prompt(program: Any) -> None:
    program.inputs = [{name: tensor[:, 1:] for name, tensor in inputs.items()} for inputs in program.inputs]


def _run_again(model: Any, *_: Any) -> None:
    if not getattr(model, "busy", False):
        model.busy = True
        model(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=False)
        model.busy = False


QUERIES: dict[str, tuple[Change, Any, Any]] = {
    "cache": (_other_options(use_cache=False), "dynamic", "off"),
    "cache_length": (_longer_cache, 13, 18),
    "training_mode": (lambda program: program.model.train(), "off", "on in 46 of 46 modules"),
    "prompt_tokens": (_shorter_prompt, 9, 8),
    "prefill": (_shorter_prompt, [1, 9], [1, 8]),
    "forwards": (lambda program: program.model.register_forward_hook(_run_again), 5, 10),
}


@pytest.mark.parametrize("fact", QUERIES)
def test_a_changed_query_voids_the_run(fact: str, run: Run) -> None:
    """A generation program that was changed before its first query fails the fact."""
    change, asked, seen = QUERIES[fact]
    _assert_mismatch(run(ANSWER, program=change), fact, asked, seen)


def test_autocast_around_a_query_voids_the_run(run: Run) -> None:
    """Autocast that the caller left on fails the fact `autocast`."""
    with torch.autocast("cpu", torch.bfloat16):
        record = run(ANSWER)
    _assert_mismatch(record, "autocast", ["off"], ["bfloat16"])


def test_a_fact_that_cannot_be_determined_is_a_note(run: Run) -> None:
    """A model that hides its head has no fact `head_dtype`, and the record stays ok."""

    def hide_head(model: Any) -> None:
        def fail() -> None:
            raise NotImplementedError("no head here")

        model.get_output_embeddings = fail

    record = run(ANSWER, model=hide_head)
    assert record.status == "ok"
    assert "head_dtype" not in record.audit
    assert "audit: head_dtype could not be determined: NotImplementedError: no head here" in record.circumstances.notes
