"""The parts of a case: model, quantization, adapter, data. Frozen values that refuse contradictions."""

from __future__ import annotations

import functools
import math
import re
from typing import Any, Literal, get_args, get_origin

import msgspec

from hpc_core.case.errors import SpecError
from hpc_core.case.shapes import SHAPES, Shape, is_tiny, layers_key, model_named


def refuse(condition: bool, message: str) -> None:
    """Raise SpecError with this message if the condition holds."""
    if condition:
        raise SpecError(message)


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of every part of a case: immutable, keyword-only, strict about unknown keys."""


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(kind)


def check_types(spec: Strict) -> None:
    """Convert fields to the types that JSON gives, so that a value made in Python equals its JSON: 16 becomes 16.0, a list a tuple."""
    for field in _fields(type(spec)):
        value = getattr(spec, field.name)
        try:
            typed = msgspec.convert(value, field.type)
        except (msgspec.ValidationError, RecursionError) as error:
            why = explained(error, {field.type})
            raise SpecError(f"{type(spec).__name__}({field.name}={value!r}): {why}") from error
        if isinstance(typed, float):
            refuse(not math.isfinite(typed), f"{type(spec).__name__}({field.name}={value!r}): must be finite.")
            typed = typed or 0.0  # -0.0 equals 0.0 but has another digest
        if typed is not value and not isinstance(typed, dict):
            msgspec.structs.force_setattr(spec, field.name, typed)


_REFUSED = re.compile(r"Invalid enum value .*?(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)


def explained(error: Exception, kinds: set[Any]) -> str:
    """Return msgspec's message about a value of one of these types, with the allowed values where it only calls one invalid."""
    found = _REFUSED.fullmatch(str(error))
    if found is None:
        return str(error)
    path = re.findall(r"\w+", found["path"] or "")
    for name in path:
        kinds = {
            field.type for kind in kinds for struct in _structs(kind) for field in _fields(struct) if field.name == name
        }
    allowed = ", ".join(repr(value) for kind in kinds for value in _literals(kind))
    return f"{error}: use one of {allowed}"


def _structs(kind: Any) -> list[type[msgspec.Struct]]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [struct for part in get_args(kind) for struct in _structs(part)]


def _literals(kind: Any) -> list[Any]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [value for part in get_args(kind) for value in _literals(part)]


def essence(value: Any) -> Any:
    """Convert to builtins without fields that equal their default. msgspec's `omit_defaults` compares by identity."""
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        fields = {} if tag is None else {str(value.__struct_config__.tag_field): tag}
        for field in _fields(type(value)):
            content = getattr(value, field.name)
            default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
            if content != default:
                fields[field.name] = essence(content)
        return fields
    return list(value) if isinstance(value, tuple) else value


Dtype = Literal["float32", "bfloat16", "float16"]
_PACKAGE_DATA = "package://"
_PATHS = {
    "folder": "a local folder",
    "hub": "a hub id",
    "gguf": "a GGUF file",
    "config": "a folder with a config.json, such a file, or a hub id",
}


class ModelSpec(Strict, frozen=True, kw_only=True):
    """Which causal language model, and where its weights come from."""

    shape: str | None = None
    """A name from `hpc_core.case.shapes`. Required for random weights and not allowed otherwise."""
    layers: int | None = None
    """Number of decoder layers, each of full width, for a short version of the model. None takes all."""
    weights: Literal["random", "folder", "hub", "gguf", "config"] = "random"
    """config: random weights in the shape of a model's `config.json`, enough for prediction and timing."""
    path: str | None = None
    """Local folder, hub id or GGUF file. `package://module/file.gguf` is a file of an installed package.
    For weights="config": a folder with a config.json, such a file, or a hub id."""
    dtype: Dtype = "bfloat16"
    attention: Literal["sdpa", "eager"] = "sdpa"
    seed: int = 0
    """Seed of random weights."""

    @property
    def drawn(self) -> bool:
        """Whether its weights are random."""
        return self.weights in ("random", "config")

    @property
    def tiny(self) -> bool:
        """Whether it is so small that a CPU trains it in milliseconds."""
        return is_tiny(self.shape)

    def configuration(self) -> dict[str, Any]:
        """Return a named shape's config.json, with the chosen number of layers.

        Raises:
            SpecError: the weights define the shape.
        """
        config = model_named(self.shape or "").config
        return config if self.layers is None else config | {layers_key(config): self.layers}

    def __post_init__(self) -> None:
        """Check that random weights have a shape, and others a path.

        Raises:
            SpecError: one is missing, or both are given.
        """
        check_types(self)
        if self.weights == "random":
            refuse(self.shape is None, "Random weights need a shape: ModelSpec(shape='llama-3.2-3b').")
            refuse(
                self.path is not None,
                f"Random weights have no path: remove path={self.path!r} or use weights='folder'.",
            )
            config = model_named(self.shape or "").config
            whole = config[layers_key(config)] if self.layers is not None else 0
            refuse(
                self.layers is not None and not 1 <= self.layers < whole,
                f"layers={self.layers}: {self.shape} has {whole}; use 1 to {whole - 1}, or omit it for all.",
            )
        else:
            refuse(not self.path, f"weights={self.weights!r} needs path=, {_PATHS[self.weights]}.")
            refuse(self.shape is not None, f"weights={self.weights!r} defines the shape: remove shape={self.shape!r}.")
            refuse(
                self.layers is not None, f"weights={self.weights!r} defines the layers: remove layers={self.layers}."
            )
        is_package = (self.path or "").startswith(_PACKAGE_DATA)
        refuse(is_package and self.weights != "gguf", "package:// names a GGUF file: use weights='gguf'.")

    @property
    def sizes(self) -> Shape | None:
        """The sizes of a named shape with the chosen number of layers; None if it has no closed form, or the weights define it."""
        whole = SHAPES.get(self.shape or "")
        if whole is None:
            return None
        return whole if self.layers is None else msgspec.structs.replace(whole, num_hidden_layers=self.layers)


_GROUPS = (32, 64, 128, 256)
"""Group sizes of the tinygemm kernels (`_weight_int4pack_mm` in ATen)."""


class QuantSpec(Strict, frozen=True, kw_only=True):
    """Weight quantization: nf4, fp4 and int8 by bitsandbytes, int4 by torchao (tile-packed, torch's tinygemm kernels)."""

    kind: Literal["nf4", "fp4", "int8", "int4"]
    compute_dtype: Dtype
    """Always explicit: the default of bitsandbytes, float32 for 4-bit, made the original report slow."""
    double_quant: bool = False
    """Quantize the block constants again (nf4 and fp4 only)."""
    group_size: int = 128
    """int4: how many weights of a row share a scale and a zero point."""
    skip_modules: tuple[str, ...] = ("lm_head",)
    """Linear layers that stay unquantized, by the last part of their name."""

    def __post_init__(self) -> None:
        """Refuse what bitsandbytes and torchao would silently ignore.

        Raises:
            SpecError: double quantization of int8 or int4; int8 with a compute dtype other than float16, int4 with one other than
                bfloat16; a group size that int4 has no kernel for, or that belongs to another kind; an int4 head.
        """
        check_types(self)
        if self.kind == "int4":
            self._check_int4()
        else:
            refuse(
                self.group_size != 128,
                f"group_size={self.group_size} applies to int4 only: remove it for {self.kind}.",
            )
        if self.kind == "int8":
            refuse(self.double_quant, "double_quant applies to nf4 and fp4 only; int8 has one constant per row.")
            refuse(
                self.compute_dtype != "float16",
                f"bitsandbytes always computes int8 matrix products in float16: use compute_dtype='float16', got {self.compute_dtype!r}.",
            )

    def _check_int4(self) -> None:
        refuse(
            self.double_quant,
            "double_quant applies to nf4 and fp4 only; int4 keeps a bfloat16 scale and zero point per group.",
        )
        refuse(
            self.compute_dtype != "bfloat16",
            f"int4 kernels multiply in bfloat16 only: use compute_dtype='bfloat16', got {self.compute_dtype!r}.",
        )
        refuse(
            self.group_size not in _GROUPS,
            f"int4 has kernels for groups of {', '.join(map(str, _GROUPS))} weights, not of {self.group_size}.",
        )
        refuse(
            "lm_head" not in self.skip_modules,
            "int4 does not quantize the head: keep 'lm_head' in skip_modules. For an int8 head use GenerateSpec(engine='graph', head='int8').",
        )


LORA_VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
}
"""Methods that are settings of peft's LoraConfig. Every other method has a configuration class of its own."""
_LORA_FIELDS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_HELD = {**_LORA_FIELDS, "targets": "target_modules", "modules_to_save": "modules_to_save"}
"""The fields of an adapter, and peft's names of them."""


def json_values(what: str, values: dict[str, Any]) -> None:
    """Check that these values equal their JSON.

    Raises:
        SpecError: they do not.
    """
    try:
        copy = msgspec.json.decode(msgspec.json.encode(values))
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise SpecError(f"{what} must be JSON values: {error}") from error
    refuse(copy != values, f"{what} change on the way through JSON: {values!r} came back as {copy!r}.")


class AdapterSpec(Strict, frozen=True, kw_only=True):
    """An adapter, built by peft: LoRA, or any other of its methods by its configuration."""

    method: str = "lora"
    """A name in `LORA_VARIANTS`, or of a method of the installed peft in lower case (its `PeftType`): vera, ia3, oft, prefix_tuning, …"""
    rank: int = 8
    alpha: float = 16.0
    """The update is scaled by alpha / rank. Rank, alpha and dropout belong to LoRA and its variants."""
    dropout: float = 0.05
    targets: tuple[str, ...] | str | None = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of modules, or what peft reads in a text ("all-linear"). None leaves the choice to peft's own table of architectures."""
    modules_to_save: tuple[str, ...] = ()
    """Modules of which peft trains a whole copy, such as the head."""
    options: dict[str, Any] = {}
    """Further settings, by the names of peft's configuration class, which gets them as they are."""
    dtype: Dtype = "float32"
    """Storage dtype of the adapter's weights. float32 is peft's default on a half-precision base (`autocast_adapter_dtype`)."""

    def __hash__(self) -> int:
        """Return a hash, although the options are a dict."""
        return hash(msgspec.json.encode(essence(self), order="sorted"))

    @property
    def is_lora(self) -> bool:
        """Whether peft's LoraConfig describes it."""
        return self.method in LORA_VARIANTS

    @property
    def is_plain(self) -> bool:
        """Whether it is two low-rank matrices on each named module and nothing else, which is what closed forms describe."""
        named = isinstance(self.targets, tuple)
        return self.method in ("lora", "rslora") and named and not self.options and not self.modules_to_save

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            SpecError: rank below 1, alpha not above 0, dropout outside [0, 1), no or repeated targets.
        """
        check_types(self)
        refuse(self.rank < 1, f"rank must be at least 1, got {self.rank}.")
        refuse(not self.alpha > 0, f"alpha must be above 0, got {self.alpha}.")
        refuse(not 0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}.")
        refuse(self.targets is not None and not self.targets, "An adapter needs at least one target module.")
        if isinstance(self.targets, tuple):
            refuse(len(set(self.targets)) != len(self.targets), f"Repeated target modules: {', '.join(self.targets)}.")
        json_values(f"Options of {self.method}", self.options)
        for name, peft_name in _HELD.items():
            of_this = self.is_lora or name not in _LORA_FIELDS
            refuse(of_this and peft_name in self.options, f"options={{{peft_name!r}: …}}: use {name}= instead.")
        if not self.is_lora:
            given = [name for name in _LORA_FIELDS if getattr(self, name) != getattr(type(self)(), name)]
            refuse(
                bool(given),
                f"{', '.join(given)} belongs to {', '.join(LORA_VARIANTS)}: give the settings of {self.method} in options=, "
                "by peft's names.",
            )


class DataSpec(Strict, frozen=True, kw_only=True):
    """Where prompts or training rows come from."""

    source: Literal["random", "trace", "embedded", "hub", "file"] = "random"
    """random: token ids of the requested length. trace: random ids with the recorded lengths of a real data set.
    embedded: texts in this package. hub: through `datasets`. file: local text or JSON lines."""
    name: str | None = None
    """trace: "gsm8k" or "wikitext2". embedded: "problems" or "paragraphs". hub: "gsm8k" or "wikitext2". file: its path."""
    rows: int | None = None
    """Take only the first rows. None takes all."""
    seed: int = 0
    """Seed of random ids and of shuffling."""

    def __post_init__(self) -> None:
        """Check names and counts.

        Raises:
            SpecError: a name is missing, unknown or not allowed; rows below 1.
        """
        check_types(self)
        known = {"trace": ("gsm8k", "wikitext2"), "embedded": ("problems", "paragraphs"), "hub": ("gsm8k", "wikitext2")}
        if self.source == "random":
            refuse(self.name is not None, f"Random ids have no name: remove name={self.name!r}.")
        elif self.source == "file":
            refuse(not self.name, "source='file' needs name=, the file's path.")
        elif self.name not in known[self.source]:
            names = " or ".join(repr(name) for name in known[self.source])
            raise SpecError(f"source={self.source!r} supports {names}, got {self.name!r}.")
        refuse(self.rows is not None and self.rows < 1, f"rows must be at least 1, got {self.rows}.")
