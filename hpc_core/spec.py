"""What to run: model, quantization, adapter, workload, case. Frozen values, equal to their JSON.

No torch, no I/O. A specification that contradicts itself is refused when it is made, in Python as from JSON.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from typing import Any, Literal

import msgspec

from hpc_core.errors import SpecError
from hpc_core.limits import Limits
from hpc_core.shapes import SHAPES, shape

__all__ = [
    "SCHEMA",
    "AdapterSpec",
    "CallableSpec",
    "Case",
    "DataSpec",
    "Dtype",
    "FinetuneSpec",
    "GenerateSpec",
    "ModelSpec",
    "QuantSpec",
    "Workload",
    "case_from_json",
    "case_to_json",
]

SCHEMA = 1
"""Version of specs, records and baselines. A changed default of any field below is a new version: digests omit defaults."""

Dtype = Literal["float32", "bfloat16", "float16"]
Checkpointing = Literal["off", "reentrant", "non-reentrant", "as-prepare-leaves-it"]
Optimizer = Literal["adamw-fused", "adamw-foreach", "adamw-8bit", "adamw-paged-8bit"]
Scale = Literal["tiny", "small", "full"]

_ID = re.compile(r"[a-z0-9][a-z0-9.+_-]*/[a-z0-9][a-z0-9.+_-]*")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_PACKAGE_DATA = "package://"


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise SpecError(message)


class _Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of every specification: immutable, keyword-only, strict about unknown keys."""


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(kind)


def _check_types(spec: _Spec) -> None:
    """Hold a value made in Python to the types that JSON is held to, so that it equals its JSON: 16 becomes 16.0, a list a tuple."""
    for field in _fields(type(spec)):
        value = getattr(spec, field.name)
        try:
            typed = msgspec.convert(value, field.type)
        except (msgspec.ValidationError, RecursionError) as error:
            raise SpecError(f"{type(spec).__name__}({field.name}={value!r}): {error}") from error
        if isinstance(typed, float):
            _refuse(not math.isfinite(typed), f"{type(spec).__name__}({field.name}={value!r}): must be finite.")
            typed = typed or 0.0  # -0.0 equals 0.0 but prints, and digests, differently
        if typed is not value and not isinstance(typed, dict):
            msgspec.structs.force_setattr(spec, field.name, typed)


def _essence(value: Any) -> Any:
    """Builtins of a specification without what equals its default. msgspec's own `omit_defaults` asks for identity, not equality."""
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        said = {} if tag is None else {str(value.__struct_config__.tag_field): tag}
        for field in _fields(type(value)):
            content = getattr(value, field.name)
            default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
            if content != default:
                said[field.name] = _essence(content)
        return said
    return list(value) if isinstance(value, tuple) else value


class ModelSpec(_Spec, frozen=True, kw_only=True):
    """Which causal language model, and where its weights come from."""

    shape: str | None = None
    """A name from `hpc_core.shapes`; needed for random weights, not allowed otherwise (real weights bring their own)."""
    weights: Literal["random", "folder", "hub", "gguf"] = "random"
    path: str | None = None
    """Local folder, hub id or GGUF file; `package://module/file.gguf` names a file that an installed package carries."""
    dtype: Dtype = "bfloat16"
    attention: Literal["sdpa", "eager"] = "sdpa"
    seed: int = 0
    """Seed of random weights."""

    def __post_init__(self) -> None:
        """Random weights need a shape, real ones a path.

        Raises:
            SpecError: either is missing, or both are given.
        """
        _check_types(self)
        if self.weights == "random":
            _refuse(self.shape is None, "Random weights need a shape: ModelSpec(shape='llama-3.2-3b').")
            _refuse(self.path is not None, f"Random weights are made, not read: drop path={self.path!r} or say weights='folder'.")
            shape(self.shape or "")
        else:
            _refuse(not self.path, f"weights={self.weights!r} needs path=, a local folder, hub id or GGUF file.")
            _refuse(self.shape is not None, f"weights={self.weights!r} brings its own shape: drop shape={self.shape!r}.")
        is_package = (self.path or "").startswith(_PACKAGE_DATA)
        _refuse(is_package and self.weights != "gguf", "package:// names a GGUF file: say weights='gguf'.")


class QuantSpec(_Spec, frozen=True, kw_only=True):
    """Weight quantization by bitsandbytes."""

    kind: Literal["nf4", "fp4", "int8"]
    compute_dtype: Dtype
    """Always explicit: bitsandbytes' own default (float32 for 4-bit) is what made the original report slow."""
    double_quant: bool = False
    """Quantize the block constants again (4-bit only)."""
    skip_modules: tuple[str, ...] = ("lm_head",)
    """Linear layers left as they are, by the last part of their name."""

    def __post_init__(self) -> None:
        """Refuse what bitsandbytes would ignore in silence.

        Raises:
            SpecError: double quantization of int8, or int8 with a compute dtype other than float16.
        """
        _check_types(self)
        if self.kind == "int8":
            _refuse(self.double_quant, "double_quant belongs to nf4 and fp4; int8 has one constant a row.")
            _refuse(
                self.compute_dtype != "float16",
                f"bitsandbytes computes int8 matrix products in float16 whatever is asked for: say compute_dtype='float16', got {self.compute_dtype!r}.",
            )


class AdapterSpec(_Spec, frozen=True, kw_only=True):
    """A LoRA adapter, as peft builds it."""

    rank: int = 8
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dtype: Dtype = "float32"
    """Storage dtype of the adapter's weights. float32 is peft's default on a half-precision base (`autocast_adapter_dtype`)."""

    def __post_init__(self) -> None:
        """Ranges.

        Raises:
            SpecError: rank below 1, alpha not above 0, dropout outside [0, 1), no or repeated targets.
        """
        _check_types(self)
        _refuse(self.rank < 1, f"rank must be at least 1, got {self.rank}.")
        _refuse(not self.alpha > 0, f"alpha must be above 0, got {self.alpha}.")
        _refuse(not 0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}.")
        _refuse(not self.targets, "An adapter needs at least one target module.")
        _refuse(len(set(self.targets)) != len(self.targets), f"Repeated target modules: {', '.join(self.targets)}.")


class DataSpec(_Spec, frozen=True, kw_only=True):
    """Where prompts or rows come from."""

    source: Literal["random", "trace", "embedded", "hub", "file"] = "random"
    """random: token ids of exactly the asked length. trace: random ids with the recorded lengths of a real data set.
    embedded: texts in the package. hub: through `datasets`. file: local text or JSON lines."""
    name: str | None = None
    """trace: "gsm8k" or "wikitext2". embedded: "problems" or "paragraphs". hub: "gsm8k" or "wikitext2". file: its path."""
    rows: int | None = None
    """Take the first so many; None takes all."""
    seed: int = 0
    """Seed of random ids and of shuffling."""

    def __post_init__(self) -> None:
        """Names and counts.

        Raises:
            SpecError: a name is missing, unknown or not wanted; rows below 1.
        """
        _check_types(self)
        known = {"trace": ("gsm8k", "wikitext2"), "embedded": ("problems", "paragraphs"), "hub": ("gsm8k", "wikitext2")}
        if self.source == "random":
            _refuse(self.name is not None, f"Random ids have no name: drop name={self.name!r}.")
        elif self.source == "file":
            _refuse(not self.name, "source='file' needs name=, the file's path.")
        elif self.name not in known[self.source]:
            names = " or ".join(repr(name) for name in known[self.source])
            raise SpecError(f"source={self.source!r} knows {names}, got {self.name!r}.")
        _refuse(self.rows is not None and self.rows < 1, f"rows must be at least 1, got {self.rows}.")


class GenerateSpec(_Spec, tag="generate", tag_field="kind", frozen=True, kw_only=True):
    """Generate exactly `new_tokens` after each prompt, greedily."""

    batch: int = 1
    prompts: int = 3
    """How many batches of prompts are timed, one after another."""
    prompt_length: int | None = 100
    """Tokens in each prompt for random data; None where the data set brings its own lengths."""
    new_tokens: int = 64
    cache: Literal["dynamic", "static", "off"] = "dynamic"
    engine: Literal["stock"] = "stock"
    extrapolate_to: int | None = None
    """Also state the seconds that so many new tokens would take, marked as extrapolated."""
    data: DataSpec = DataSpec()

    def __post_init__(self) -> None:
        """Ranges, and lengths said exactly once.

        Raises:
            SpecError: a count below 1, a length given twice or not at all, an extrapolation backwards.
        """
        _check_types(self)
        for name in ("batch", "prompts"):
            _refuse(getattr(self, name) < 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        _refuse(self.new_tokens < 2, f"new_tokens must be at least 2 (the first one is the prefill's), got {self.new_tokens}.")
        if self.data.source == "random":
            _refuse(self.prompt_length is None or self.prompt_length < 1, "Random prompts need prompt_length of at least 1.")
        else:
            _refuse(self.prompt_length is not None, f"{self.data.source} prompts bring their own lengths: say prompt_length=None.")
        too_short = self.extrapolate_to is not None and self.extrapolate_to < self.new_tokens
        _refuse(too_short, f"extrapolate_to={self.extrapolate_to} is below new_tokens={self.new_tokens}.")


class FinetuneSpec(_Spec, tag="finetune", tag_field="kind", frozen=True, kw_only=True):
    """Train by a plain loop: forward, backward, optimizer, zero_grad."""

    batch: int = 4
    length: int = 512
    """Tokens a row at most; with padding="max_length" or packing, exactly."""
    padding: Literal["none", "longest", "max_length"] = "none"
    packing: bool = False
    """Join rows and cut them into full blocks of `length`; needs no padding and no mask."""
    checkpointing: Checkpointing = "off"
    """Gradient (activation) checkpointing, or what `prepare_model_for_kbit_training` leaves."""
    prepare: bool = False
    """Call peft's `prepare_model_for_kbit_training` first: float32 norms, embeddings and head."""
    optimizer: Optimizer = "adamw-fused"
    learning_rate: float = 1e-5
    precision: Literal["pure", "autocast-bf16"] = "pure"
    """pure computes in the weights' dtype; autocast-bf16 wraps the forward."""
    steps: int = 10
    """Timed steps, after warm-up."""
    epoch_rows: int | None = None
    """Rows of the data set that an epoch is extrapolated to; None where the data has a size of its own."""
    data: DataSpec = DataSpec()

    def __post_init__(self) -> None:
        """Ranges, and combinations that contradict each other.

        Raises:
            SpecError: packing with padding, unpadded rows of different lengths, checkpointing left to an absent `prepare` …
        """
        _check_types(self)
        for name in ("batch", "length", "steps"):
            _refuse(getattr(self, name) < 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        _refuse(self.length < 2, "length must be at least 2: the loss needs a next token.")
        _refuse(not self.learning_rate > 0, f"learning_rate must be above 0, got {self.learning_rate}.")
        _refuse(
            self.packing and self.padding != "none",
            f"Packing fills every block, so there is nothing to pad: packing=True contradicts padding={self.padding!r}.",
        )
        ragged = self.data.source != "random" and not self.packing and self.padding == "none"
        _refuse(ragged, f"Rows of {self.data.source} differ in length: say padding='longest', padding='max_length' or packing=True.")
        full = self.data.source == "random" and (self.packing or self.padding != "none")
        _refuse(full, "Random rows are full already: drop packing and padding, or take data with lengths of its own.")
        _refuse(
            self.checkpointing == "as-prepare-leaves-it" and not self.prepare,
            "checkpointing='as-prepare-leaves-it' needs prepare=True.",
        )


class CallableSpec(_Spec, tag="callable", tag_field="kind", frozen=True, kw_only=True):
    """A step of the user's own: an importable factory that returns a callable, called once a step."""

    factory: str
    """`package.module:function`; called in the worker with `arguments`, returns the step."""
    arguments: dict[str, Any] = {}
    """JSON values only, so that the case equals its JSON."""
    steps: int = 10
    device: Literal["any", "cuda"] = "any"

    def __post_init__(self) -> None:
        """The factory must be importable by name and its arguments JSON.

        Raises:
            SpecError: otherwise.
        """
        _check_types(self)
        _refuse(not _FACTORY.fullmatch(self.factory), f"A factory is named 'package.module:function', got {self.factory!r}.")
        _refuse(self.steps < 1, f"steps must be at least 1, got {self.steps}.")
        try:
            copy = msgspec.json.decode(msgspec.json.encode(self.arguments))
        except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            raise SpecError(f"Arguments of {self.factory} must be JSON values: {error}") from error
        _refuse(copy != self.arguments, f"Arguments of {self.factory} change on the way through JSON: {self.arguments!r} came back as {copy!r}.")


Workload = GenerateSpec | FinetuneSpec | CallableSpec


class Case(_Spec, frozen=True, kw_only=True):
    """One benchmark: what to run, under which id, within which time and limits."""

    id: str
    """`<shape>/<variant>`; the same in files, JSON, `--case` and on the command line."""
    scale: Scale
    model: ModelSpec | None = None
    quantization: QuantSpec | None = None
    adapter: AdapterSpec | None = None
    workload: Workload
    seed: int = 0
    """Seed of everything drawn while running: dropout, adapter initialization."""
    timeout_s: float = 300.0
    """Wall-clock seconds that the worker may take, imports of a cold worker excluded."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        """Check the parts against each other.

        Raises:
            SpecError: a malformed id, QLoRA without quantization, full fine-tuning of quantized weights …
        """
        _check_types(self)
        _refuse(not _ID.fullmatch(self.id), f"A case id is <shape>/<variant> in lower case, such as 'tiny/lora', got {self.id!r}.")
        _refuse(not self.timeout_s > 0, f"{self.id}: timeout_s must be above 0, got {self.timeout_s}.")
        if isinstance(self.workload, CallableSpec):
            extra = [part for part in ("model", "quantization", "adapter") if getattr(self, part) is not None]
            _refuse(bool(extra), f"{self.id}: a callable builds its own model: drop {', '.join(extra)}.")
            return
        _refuse(self.model is None, f"{self.id}: a {self.workload.__struct_config__.tag} case needs a model.")
        if isinstance(self.workload, FinetuneSpec):
            self._check_finetune(self.workload)
        elif self.adapter is not None:
            raise SpecError(f"{self.id}: generation with an adapter is not built yet: drop adapter=.")
        self._check_names()

    def _check_finetune(self, workload: FinetuneSpec) -> None:
        quantized = self.quantization is not None
        _refuse(quantized and self.adapter is None, f"{self.id}: quantized weights take no gradient: add an adapter (QLoRA) or drop the quantization.")
        _refuse(workload.prepare and self.adapter is None, f"{self.id}: prepare freezes every weight, so without an adapter nothing would train.")
        _refuse(workload.prepare and not quantized, f"{self.id}: prepare=True is for quantized models; give quantization= (QLoRA) or drop it.")
        variant = self.id.partition("/")[2]
        _refuse(variant.startswith("qlora") and not quantized, f"{self.id}: QLoRA without quantization is LoRA: give quantization= or rename it.")

    def _check_names(self) -> None:
        model = self.model
        if model is not None and model.shape is not None:
            prefix = self.id.partition("/")[0]
            wrong = prefix in SHAPES and prefix != model.shape
            _refuse(wrong, f"{self.id}: the id says {prefix}, the model is {model.shape}.")

    @property
    def digest(self) -> str:
        """Twelve hex digits of SHA-256 over what runs: id, timeout and limits left out, so changing those keeps baselines."""
        parts = [self.model, self.quantization, self.adapter, self.workload, self.seed, self.scale]
        work = {"schema": SCHEMA, "parts": [_essence(part) for part in parts]}
        return hashlib.sha256(msgspec.json.encode(work, order="sorted")).hexdigest()[:12]

    @property
    def needs_gpu(self) -> bool:
        """Full-scale cases, and callables that say so, run on a CUDA GPU only."""
        return self.scale == "full" or (isinstance(self.workload, CallableSpec) and self.workload.device == "cuda")

    @property
    def kind(self) -> str:
        """"generate", "finetune" or "callable"."""
        return str(self.workload.__struct_config__.tag)

    def vary(self, variant: str, **changes: Any) -> Case:
        """A new case under the id `<shape>/<variant>`, with fields changed wherever they live.

        A field is named as in its part (`rank=16`, `batch=8`, `timeout_s=120`); one that several parts have is named
        with the part (`model_dtype`, `adapter_dtype`, `data_seed`). `quantization=None` or a whole part replaces it.

        Raises:
            SpecError: a field that no part has, or that several have; a variant that changes nothing.
        """
        from hpc_core.vary import varied  # a method for its readers, a module of its own for its rules

        return varied(self, variant, changes)


def case_to_json(case: Case) -> bytes:
    """Canonical JSON: sorted keys, defaults left out."""
    return msgspec.json.encode(_essence(case), order="sorted")


def case_from_json(text: bytes | str) -> Case:
    """The case that this JSON says.

    Raises:
        SpecError: the JSON is malformed, has unknown keys, or contradicts itself; the message holds the path.
    """
    try:
        return msgspec.json.decode(text, type=Case)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"Not a case: {error}") from error
