"""Behind the case's back: each fact, made untrue in the live module or in what runs, voids the run and is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpc_core.audit.model import linear_layers
from hpc_core.builders.assemble import Built, build
from hpc_core.case.case import Case
from hpc_core.case.parts import QuantSpec
from hpc_core.catalogue import TINY, finetune, generate, lora, qlora, tiny
from hpc_core.engines.finetune import finetune_program, make_optimizer
from hpc_core.engines.generate import generate_program
from hpc_core.record.job import Job
from hpc_core.record.record import Record
from hpc_core.worker.perform import perform

_short: dict[str, Any] = {"batch": 2, "length": 16, "steps": 2}
LORA = finetune(tiny, lora(), **_short)
FULL = finetune(tiny, **_short)
QLORA = finetune(tiny, qlora(), **_short)
NF4 = QuantSpec(kind="nf4", compute_dtype="bfloat16")
ANSWER = generate(tiny, prompts=1, prompt_length=9, new_tokens=6)
NF4_ANSWER = ANSWER.vary("generate-nf4", quantization=NF4)

Change = Callable[[Any], None]


def _perform(case: Case) -> Record:
    return perform(Job(case=case, launched="inline", device="cpu"), lambda _: None)


def _mismatch(record: Record, fact: str, asked: Any, seen: Any) -> None:
    assert record.status == "invalid"
    assert (record.audit[fact].asked, record.audit[fact].seen) == (asked, seen)
    assert f"{fact}: asked for {asked!r}, saw {seen!r}." in record.reasons


def _built_otherwise(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    def built(case: Case, device: torch.device) -> Built:
        made = build(case, device)
        change(made.model)
        return made

    monkeypatch.setattr("hpc_core.worker.place.build", built)


def _layers(model: Any) -> list[Any]:
    return [layer for name, layer in linear_layers(model).items() if not name.endswith("lm_head")]


def _one_plain(model: Any) -> None:
    name = next(iter(linear_layers(model)))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, torch.nn.Linear(128, 128, bias=False, dtype=torch.bfloat16))
    model.requires_grad_(False)


def _compute_in_float32(model: Any) -> None:
    for layer in _layers(model):
        layer.compute_dtype = torch.float32


def _norms(model: Any) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.float()
            module.register_forward_hook(lambda *call: call[2].bfloat16())


def _wide_constants(model: Any) -> None:
    for layer in _layers(model):
        layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.double()


def _freeze(model: Any) -> None:
    name, parameter = next((name, part) for name, part in model.named_parameters() if part.requires_grad)
    assert name.endswith("layers.0.self_attn.q_proj.lora_A.default.weight")
    parameter.requires_grad_(False)


def _embedding_trains(model: Any) -> None:
    model.get_input_embeddings().weight.requires_grad_(True)


def _dropout_off(model: Any) -> None:
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default"):
            module.p = 0.0


def _with_graph(model: Any) -> None:
    model.requires_grad_(True)

    def enable(*_: Any) -> None:
        torch.set_grad_enabled(True)  # until generate's own no_grad ends and puts back what was

    model.register_forward_pre_hook(enable)


_FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
_NAMES = sorted(f"{target}_proj.lora_{half}" for target in "kqvo" for half in "AB")
_EMBEDDING = "base_model.model.model.embed_tokens.weight"

MODELS = {
    "quantized_layers": (NF4_ANSWER, _one_plain, 21, "20; model.layers.0.self_attn.q_proj is not"),
    "compute_dtype": (NF4_ANSWER, _compute_in_float32, ["bfloat16"], ["float32"]),
    "quantized_bytes": (NF4_ANSWER, _wide_constants, 250176, 250176 + 4 * 6912),
    "norm_dtype": (LORA, _norms, ["bfloat16"], ["float32"]),
    "trainable_parameters": (LORA, _freeze, 21504, 21504 - 8 * 128),
    "trainable_names": (LORA, _embedding_trains, _NAMES, [_EMBEDDING, *_NAMES]),
    "dropout": (LORA, _dropout_off, [0.05], [0.0]),
    "autograd": (ANSWER, _with_graph, "off", "on"),
}


@pytest.mark.parametrize("fact", MODELS)
def test_a_changed_model_voids_the_run(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is changed after it was built, and the record says what was asked and what was there."""
    case, change, asked, seen = MODELS[fact]
    _built_otherwise(monkeypatch, change)
    _mismatch(_perform(case), fact, asked, seen)


@pytest.mark.parametrize(
    ("fact", "change"), [("embedding_dtype", "get_input_embeddings"), ("head_dtype", "get_output_embeddings")]
)
def test_a_float32_embedding_or_head_voids_the_run(fact: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding and the head, tied here, are stored as the model says."""

    def widen(model: Any) -> None:
        weight = getattr(model, change)().weight
        weight.data = weight.data.float()
        model.get_input_embeddings().register_forward_hook(lambda *call: call[2].bfloat16())
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))

    _built_otherwise(monkeypatch, widen)
    _mismatch(_perform(ANSWER), fact, "bfloat16", "float32")


def test_fp4_for_nf4_and_lost_double_quantization_void_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer that was told something else is found out in the layers."""
    from hpc_core.builders.quantization import quantize

    other = QuantSpec(kind="fp4", compute_dtype="bfloat16", double_quant=True)
    monkeypatch.setattr("hpc_core.builders.assemble.quantize", lambda model, _, device: quantize(model, other, device))
    record = _perform(NF4_ANSWER)
    _mismatch(record, "quantization", ["nf4"], ["fp4"])
    _mismatch(record, "double_quantization", [False], [True])


def test_a_silently_skipped_quantization_voids_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer at all is quantized: the count says so."""
    monkeypatch.setattr("hpc_core.builders.assemble.quantize", lambda *_: None)
    record = _perform(QLORA)
    _mismatch(record, "quantized_layers", 21, "0; base_model.model.model.layers.0.self_attn.q_proj is not")


def test_a_prepare_that_casts_nothing_voids_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `prepare` norms, embeddings and head are float32, or it did not happen."""
    monkeypatch.setattr("hpc_core.builders.assemble.prepare_for_training", lambda model, _: model.requires_grad_(False))
    record = _perform(QLORA.vary("qlora-prepare", prepare=True))
    _mismatch(record, "norm_dtype", ["float32"], ["bfloat16"])
    _mismatch(record, "embedding_dtype", "float32", "bfloat16")


def test_the_other_kind_of_checkpointing_voids_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reentrant and not recompute as often; the graph tells them apart."""
    from hpc_core.builders.assemble import enable_checkpointing

    monkeypatch.setattr(
        "hpc_core.builders.assemble.enable_checkpointing",
        lambda model, _, **more: enable_checkpointing(model, "reentrant", **more),
    )
    record = _perform(LORA.vary("lora-gc", checkpointing="non-reentrant"))
    _mismatch(record, "checkpointing_kind", "non-reentrant", "reentrant")
    assert len(record.reasons) == 1


def _programmed_otherwise(monkeypatch: pytest.MonkeyPatch, change: Change, kind: str = "finetune") -> None:
    make: Any = {"finetune": finetune_program, "generate": generate_program}[kind]

    def program(*arguments: Any) -> Any:
        made = make(*arguments)
        change(made)
        return made

    monkeypatch.setattr(f"hpc_core.engines.{kind}.{kind}_program", program)


def _asleep(program: Any) -> None:
    program.model.eval()


def _half_labels(program: Any) -> None:
    for batch in program.batches:
        batch.labels[:, ::2] = -100


def _autocast(program: Any) -> None:
    program._autocast = True


def _foreach(program: Any) -> None:
    program.optimizer = make_optimizer(
        LORA.vary("x", optimizer="adamw-foreach").workload,  # type: ignore[arg-type]
        [part for part in program.model.parameters() if part.requires_grad],
    )


def _wide_moments(program: Any) -> None:
    # Moments are made in the parameter's dtype by the first step; here something widens them after it.
    def widen(*_: Any) -> None:
        for state in program.optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].double()

    program.optimizer.register_step_post_hook(widen)
    program.optimizer.register_step_pre_hook(lambda *_: _narrow(program))


def _narrow(program: Any) -> None:
    for state in program.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float()


def _no_gradient(program: Any) -> None:
    def silence(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 0

    dict(program.model.named_parameters())[_FIRST].register_hook(silence)


PROGRAMS = {
    "training_mode": (_asleep, "on", "off in 168 of 168 modules"),
    "trained_tokens": (_half_labels, 64, 32),
    "batch": (_half_labels, "2 x 16 ids, 32 labels, 0 masked", "2 x 16 ids, 16 labels, 0 masked"),
    "autocast": (_autocast, ["off"], ["bfloat16"]),
    "optimizer": (_foreach, "adamw-fused", "adamw-foreach"),
    "optimizer_state_dtype": (_wide_moments, ["float32"], ["float32", "float64"]),
    "gradients": (_no_gradient, "24 of 24 reached", f"23 of 24 reached; {_FIRST} is zero"),
}


@pytest.mark.parametrize("fact", PROGRAMS)
def test_a_changed_step_voids_the_run(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training program is changed before its first step, and the record says what it then did."""
    change, asked, seen = PROGRAMS[fact]
    _programmed_otherwise(monkeypatch, change)
    _mismatch(_perform(LORA), fact, asked, seen)


def test_a_gradient_that_is_gone_before_the_step_voids_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrived, and the optimizer never saw it."""

    def drop(program: Any) -> None:
        def forget(parameter: torch.Tensor) -> None:
            parameter.grad = None

        dict(program.model.named_parameters())[_FIRST].register_post_accumulate_grad_hook(forget)

    _programmed_otherwise(monkeypatch, drop)
    _mismatch(_perform(LORA), "gradients", "24 of 24 reached", f"23 of 24 reached; {_FIRST} has none")


def test_a_dropped_padding_mask_voids_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that the model attends to is padding that the masks no longer say."""
    case = next(case for case in TINY if case.id == "tiny/lora-max-length")

    def unmask(program: Any) -> None:
        for batch in program.batches:
            batch.mask.fill_(1)

    _programmed_otherwise(monkeypatch, unmask)
    record = _perform(case)
    asked = record.metrics["padded_tokens"].value
    assert asked > 0
    _mismatch(record, "padded_tokens", asked, 0)
    assert record.audit["batch"].seen.endswith(" 0 masked")


@pytest.mark.parametrize("case", [LORA, ANSWER], ids=lambda case: case.kind)
@pytest.mark.parametrize(
    ("change", "seen"), [("eager", "eager"), ("math", "sdpa, unfused (math)")], ids=["eager", "math"]
)
def test_attention_that_is_not_fused_voids_the_run(
    case: Case, change: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager attention, and torch's own unfused way, are told from a fused kernel by the operators that ran."""
    if change == "math":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            record = _perform(case)
    else:
        _built_otherwise(monkeypatch, lambda model: setattr(model.config, "_attn_implementation", "eager"))
        record = _perform(case)
    _mismatch(record, "attention", "sdpa", seen)
    assert len(record.reasons) == 1


def _other_options(**more: Any) -> Change:
    def change(program: Any) -> None:
        generate_as_asked = program.model.generate
        program.model.generate = lambda **options: generate_as_asked(**{**options, **more})

    return change


def _longer_cache(program: Any) -> None:
    def longer(_: Any, __: Any, output: Any) -> None:
        for layer in output.past_key_values.layers:
            layer.keys = torch.cat([layer.keys, layer.keys[:, :, -1:]], dim=2)
            layer.values = torch.cat([layer.values, layer.values[:, :, -1:]], dim=2)

    program.model.register_forward_hook(longer)


def _shorter_prompt(program: Any) -> None:
    program.inputs = [{name: tensor[:, 1:] for name, tensor in inputs.items()} for inputs in program.inputs]


QUERIES = {
    "cache": (_other_options(use_cache=False), "dynamic", "off"),
    "cache_length": (_longer_cache, 13, 18),
    "training_mode": (lambda program: program.model.train(), "off", "on in 46 of 46 modules"),
    "prompt_tokens": (_shorter_prompt, 9, 8),
    "prefill": (_shorter_prompt, [1, 9], [1, 8]),
    "forwards": (lambda program: program.model.register_forward_hook(_again), 5, 10),
}


def _again(model: Any, inputs: Any, output: Any) -> None:
    if not getattr(model, "busy", False):
        model.busy = True
        model(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=False)
        model.busy = False


@pytest.mark.parametrize("fact", QUERIES)
def test_a_changed_query_voids_the_run(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generation program is changed before its first query, and the record says what it then did."""
    change, asked, seen = QUERIES[fact]
    _programmed_otherwise(monkeypatch, change, "generate")
    _mismatch(_perform(ANSWER), fact, asked, seen)


def test_autocast_around_a_query_voids_the_run() -> None:
    """Autocast that a caller left on is seen inside the forwards."""
    with torch.autocast("cpu", torch.bfloat16):
        record = _perform(ANSWER)
    _mismatch(record, "autocast", ["off"], ["bfloat16"])


def test_what_cannot_be_determined_is_a_note_and_no_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that hides its head costs one fact, not the run."""

    def hide(model: Any) -> None:
        def gone() -> None:
            raise NotImplementedError("no head here")

        model.get_output_embeddings = gone

    _built_otherwise(monkeypatch, hide)
    record = _perform(ANSWER)
    assert record.status == "ok"
    assert "head_dtype" not in record.audit
    assert "audit: head_dtype could not be determined: NotImplementedError: no head here" in record.circumstances.notes
