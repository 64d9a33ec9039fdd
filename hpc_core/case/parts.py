"""The parts of a case: model, quantization, adapter, data. Frozen values, each refused when it contradicts itself."""

from __future__ import annotations

from typing import Literal

import msgspec

from hpc_core.case.errors import SpecError
from hpc_core.case.shapes import Shape, shape
from hpc_core.case.strict import Strict, check_types, refuse

__all__ = ["AdapterSpec", "DataSpec", "Dtype", "ModelSpec", "QuantSpec"]

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
    """A name from `hpc_core.case.shapes`; needed for random weights, not allowed otherwise (real weights bring their own)."""
    layers: int | None = None
    """Only so many decoder layers of the shape, each at its full width: a short stand-in for the whole. None takes all."""
    weights: Literal["random", "folder", "hub", "gguf", "config"] = "random"
    """config: random ones, in the shape that a model's `config.json` says; enough to predict it, or to time it."""
    path: str | None = None
    """Local folder, hub id or GGUF file; `package://module/file.gguf` names a file that an installed package carries.
    For weights="config" a folder with a config.json, such a file, or a hub id."""
    dtype: Dtype = "bfloat16"
    attention: Literal["sdpa", "eager"] = "sdpa"
    seed: int = 0
    """Seed of random weights."""

    @property
    def drawn(self) -> bool:
        """Whether its weights are random, and so mean nothing."""
        return self.weights in ("random", "config")

    def __post_init__(self) -> None:
        """Random weights need a shape, real ones a path.

        Raises:
            SpecError: either is missing, or both are given.
        """
        check_types(self)
        if self.weights == "random":
            refuse(self.shape is None, "Random weights need a shape: ModelSpec(shape='llama-3.2-3b').")
            refuse(
                self.path is not None,
                f"Random weights are made, not read: drop path={self.path!r} or say weights='folder'.",
            )
            whole = shape(self.shape or "")
            refuse(
                self.layers is not None and not 1 <= self.layers < whole.num_hidden_layers,
                f"layers={self.layers}: {self.shape} has {whole.num_hidden_layers}; say 1 to {whole.num_hidden_layers - 1}, or leave it out for all.",
            )
        else:
            refuse(not self.path, f"weights={self.weights!r} needs path=, {_PATHS[self.weights]}.")
            refuse(self.shape is not None, f"weights={self.weights!r} brings its own shape: drop shape={self.shape!r}.")
            refuse(
                self.layers is not None, f"weights={self.weights!r} brings its own layers: drop layers={self.layers}."
            )
        is_package = (self.path or "").startswith(_PACKAGE_DATA)
        refuse(is_package and self.weights != "gguf", "package:// names a GGUF file: say weights='gguf'.")

    @property
    def sizes(self) -> Shape | None:
        """The named shape with as many layers as are taken; None where the weights bring their own."""
        if self.shape is None:
            return None
        whole = shape(self.shape)
        return whole if self.layers is None else msgspec.structs.replace(whole, num_hidden_layers=self.layers)


_GROUPS = (32, 64, 128, 256)
"""Weights of a row that may share a scale and a zero: what tinygemm's kernels have (`_weight_int4pack_mm` in ATen)."""


class QuantSpec(Strict, frozen=True, kw_only=True):
    """Weight quantization: nf4, fp4 and int8 by bitsandbytes, int4 by torchao (tile-packed, torch's tinygemm kernels)."""

    kind: Literal["nf4", "fp4", "int8", "int4"]
    compute_dtype: Dtype
    """Always explicit: bitsandbytes' own default (float32 for 4-bit) is what made the original report slow."""
    double_quant: bool = False
    """Quantize the block constants again (nf4 and fp4 only)."""
    group_size: int = 128
    """int4: so many weights of a row share a scale and a zero. The other kinds have a layout of their own."""
    skip_modules: tuple[str, ...] = ("lm_head",)
    """Linear layers left as they are, by the last part of their name."""

    def __post_init__(self) -> None:
        """Refuse what bitsandbytes and torchao would ignore in silence.

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
                f"group_size={self.group_size} belongs to int4; {self.kind} has its own layout: drop it.",
            )
        if self.kind == "int8":
            refuse(self.double_quant, "double_quant belongs to nf4 and fp4; int8 has one constant a row.")
            refuse(
                self.compute_dtype != "float16",
                f"bitsandbytes computes int8 matrix products in float16 whatever is asked for: say compute_dtype='float16', got {self.compute_dtype!r}.",
            )

    def _check_int4(self) -> None:
        refuse(
            self.double_quant, "double_quant belongs to nf4 and fp4; int4 keeps a scale and a zero a group in bfloat16."
        )
        refuse(
            self.compute_dtype != "bfloat16",
            f"int4's kernels multiply in bfloat16 only: say compute_dtype='bfloat16', got {self.compute_dtype!r}.",
        )
        refuse(
            self.group_size not in _GROUPS,
            f"int4 has kernels for groups of {', '.join(map(str, _GROUPS))} weights, not of {self.group_size}.",
        )
        refuse(
            "lm_head" not in self.skip_modules,
            "int4 leaves the head as it is: keep 'lm_head' in skip_modules. A head in int8 is GenerateSpec(engine='graph', head='int8').",
        )


class AdapterSpec(Strict, frozen=True, kw_only=True):
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
        check_types(self)
        refuse(self.rank < 1, f"rank must be at least 1, got {self.rank}.")
        refuse(not self.alpha > 0, f"alpha must be above 0, got {self.alpha}.")
        refuse(not 0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}.")
        refuse(not self.targets, "An adapter needs at least one target module.")
        refuse(len(set(self.targets)) != len(self.targets), f"Repeated target modules: {', '.join(self.targets)}.")


class DataSpec(Strict, frozen=True, kw_only=True):
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
        check_types(self)
        known = {"trace": ("gsm8k", "wikitext2"), "embedded": ("problems", "paragraphs"), "hub": ("gsm8k", "wikitext2")}
        if self.source == "random":
            refuse(self.name is not None, f"Random ids have no name: drop name={self.name!r}.")
        elif self.source == "file":
            refuse(not self.name, "source='file' needs name=, the file's path.")
        elif self.name not in known[self.source]:
            names = " or ".join(repr(name) for name in known[self.source])
            raise SpecError(f"source={self.source!r} knows {names}, got {self.name!r}.")
        refuse(self.rows is not None and self.rows < 1, f"rows must be at least 1, got {self.rows}.")
