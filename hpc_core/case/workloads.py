"""What a case does: generate, fine-tune, or call a step of the user's own. Frozen values, refused when they contradict themselves."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from hpc_core.case.engines import check_engine
from hpc_core.case.errors import SpecError
from hpc_core.case.parts import DataSpec, Strict, check_types, refuse

Checkpointing = Literal["off", "reentrant", "non-reentrant", "as-prepare-leaves-it"]
Optimizer = Literal["adamw-fused", "adamw-foreach", "adamw-8bit", "adamw-paged-8bit"]

_SOAK_STEPS = 100
"""Shorter runs are no soak: with a few steps a creep of one tensor a step cannot be told from settling."""

_SWITCHES = {
    "loss": "stock",
    "loss_chunk": 512,
    "fusion": "off",
    "compile": "off",
    "graph": False,
    "budget_bytes": None,
    "optimizer_in_backward": False,
}
"""The switches of the tuned training engine, by their defaults."""

_OWN_DECODING = {
    "kernels": "triton",
    "head": "plain",
    "cache_step": 256,
    "eos_every": None,
    "temperature": None,
    "top_k": None,
}
"""What only the graph engine knows, by its defaults."""

ENGINE_FIELDS = {
    "finetune": ("engine", *_SWITCHES),
    "generate": ("engine", "kernels", "head", "cache_step"),
}
"""By kind of work, the fields that say how an engine does it and not what is done. Sampling, and stopping early, are other work."""

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_MOST_WORKERS = 64
_MOST_AHEAD = 64
_MOST_ROWS = 32
"""The graph engine's largest batch."""


class FeedSpec(Strict, frozen=True, kw_only=True):
    """The data path of a fine-tuning case. Which batches a step sees does not depend on it."""

    way: Literal["resident", "loader"] = "resident"
    """resident: every batch lies on the device before the first step. loader: torch's DataLoader hands them over one by one."""
    tokenize: Literal["cached", "fetch"] = "cached"
    """cached: tokenized, packed or padded once, and read from a file ever after. fetch: texts are tokenized when their batch is asked for."""
    workers: int = 0
    """Processes that make batches; 0 makes them in the training process."""
    pinned: bool = False
    """Batches go through page-locked memory of the host, which a GPU copies from without the host's help."""
    ahead: int = 0
    """So many batches are copied to the device before their step begins, on a stream of their own; 0 copies each when its step begins."""

    def __post_init__(self) -> None:
        """Ranges, and nothing said of a loader where there is none.

        Raises:
            SpecError: otherwise.
        """
        check_types(self)
        refuse(not 0 <= self.workers <= _MOST_WORKERS, f"workers must be 0 to {_MOST_WORKERS}, got {self.workers}.")
        refuse(not 0 <= self.ahead <= _MOST_AHEAD, f"ahead must be 0 to {_MOST_AHEAD}, got {self.ahead}.")
        if self.way == "resident":
            defaults = {"tokenize": "cached", "workers": 0, "pinned": False, "ahead": 0}
            said = [name for name, default in defaults.items() if getattr(self, name) != default]
            refuse(bool(said), f"{', '.join(said)} belongs to a feed with way='loader'; the way is 'resident'.")


class GenerateSpec(Strict, tag="generate", tag_field="kind", frozen=True, kw_only=True):
    """Generate `new_tokens` after each prompt, exactly so many and greedily unless it says otherwise."""

    batch: int = 1
    prompts: int = 3
    """How many batches of prompts are timed, one after another."""
    prompt_length: int | None = 100
    """Tokens in each prompt for random data; None where the data set brings its own lengths."""
    new_tokens: int = 64
    cache: Literal["dynamic", "static", "off"] = "dynamic"
    compiled: bool = True
    """Where the cache is static, transformers compiles the forward on a GPU; False keeps it eager."""
    engine: str = "stock"
    """stock: transformers' `generate`. graph: a static cache and one CUDA graph a token (`hpc_core.engines`); eager without CUDA.
    Or the name by which an installed package registers an engine."""
    kernels: Literal["triton", "inductor", "torch"] = "triton"
    """What a token of the graph engine runs on a GPU: our own fused kernels, each layer compiled by Inductor, or torch's own. A CPU runs torch's."""
    head: Literal["plain", "int8"] = "plain"
    """int8: the graph engine decodes with a copy of the head in int8, a scale a row."""
    cache_step: int = 256
    """The graph engine's cache has room in steps of at most so many tokens: of the power of two below a 128th of what is needed, where that is less."""
    eos_every: int | None = None
    """The graph engine stops where every row has ended, and looks every so many tokens; None never looks, as `engine="stock"` does."""
    temperature: float | None = None
    """The graph engine samples at this temperature, by the case's seed; None is greedy."""
    top_k: int | None = None
    """Sample among so many of the likeliest tokens."""
    extrapolate_to: int | None = None
    """Also state the seconds that so many new tokens would take, marked as extrapolated."""
    data: DataSpec = DataSpec()

    def __post_init__(self) -> None:
        """Ranges, and lengths said exactly once.

        Raises:
            SpecError: a count below 1, a length given twice or not at all, an extrapolation backwards.
        """
        check_types(self)
        for name in ("batch", "prompts"):
            refuse(getattr(self, name) < 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        refuse(
            self.new_tokens < 2,
            f"new_tokens must be at least 2 (the first one is the prefill's), got {self.new_tokens}.",
        )
        if self.data.source == "random":
            refuse(
                self.prompt_length is None or self.prompt_length < 1, "Random prompts need prompt_length of at least 1."
            )
        else:
            refuse(
                self.prompt_length is not None,
                f"{self.data.source} prompts bring their own lengths: say prompt_length=None.",
            )
        refuse(
            not self.compiled and self.cache != "static",
            f"compiled=False belongs to cache='static', which alone is compiled; the cache is {self.cache!r}.",
        )
        self._check_engine()
        too_short = self.extrapolate_to is not None and self.extrapolate_to < self.new_tokens
        refuse(too_short, f"extrapolate_to={self.extrapolate_to} is below new_tokens={self.new_tokens}.")

    def _check_engine(self) -> None:
        """What only the graph engine knows is refused elsewhere, and what it brings itself is not said to it."""
        check_engine("generate", self.engine)
        if self.engine != "graph":
            given = [name for name, default in _OWN_DECODING.items() if getattr(self, name) != default]
            refuse(bool(given), f"{', '.join(given)} belongs to engine='graph'; the engine is {self.engine!r}.")
        else:
            refuse(
                self.cache != "dynamic",
                f"engine='graph' brings a static cache of its own: drop cache={self.cache!r}.",
            )
            refuse(not 1 <= self.batch <= _MOST_ROWS, f"engine='graph' takes a batch of 1 to 32, got {self.batch}.")
        for name in ("cache_step", "eos_every", "top_k"):
            value = getattr(self, name)
            refuse(value is not None and value < 1, f"{name} must be at least 1, got {value}.")
        refuse(
            self.temperature is not None and not self.temperature > 0,
            f"temperature must be above 0, got {self.temperature}; leave it out for greedy.",
        )
        refuse(self.top_k is not None and self.temperature is None, f"top_k={self.top_k} needs a temperature.")


class FinetuneSpec(Strict, tag="finetune", tag_field="kind", frozen=True, kw_only=True):
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
    """Timed steps, after warm-up; with so many that it `soaks`, memory is held to stay flat over them."""
    epoch_rows: int | None = None
    """Rows of the data set that an epoch is extrapolated to; None where the data has a size of its own."""
    engine: str = "stock"
    """stock: the libraries' own forward and loss. tuned: `hpc_core.engines`, whose switches are the fields below. Or the name by
    which an installed package registers an engine."""
    loss: Literal["stock", "chunked", "liger"] = "stock"
    """chunked: head and cross-entropy in one, some rows at a time; the logits never exist as a whole. liger: the same by liger-kernel."""
    loss_chunk: int = 512
    """Rows of the chunked loss at a time; Liger takes a power of two, at least so many."""
    fusion: Literal["off", "linears", "blocks", "liger"] = "off"
    """linears: each linear layer with its adapter is one function, that dequantizes once a use. blocks: norm, projections and
    gates of a decoder layer too, with kernels of their own, and no mask. liger: norms, rotations and gates by liger-kernel, on a GPU."""
    compile: Literal["off", "layers"] = "off"
    """layers: torch.compile of each decoder layer."""
    graph: bool = False
    """The whole step, optimizer included, is one CUDA graph."""
    budget_bytes: int | None = None
    """Peak memory of a step at most: as many halves of decoder layers are computed again in the backward as that takes."""
    optimizer_in_backward: bool = False
    """AdamW steps a weight as soon as its gradient is whole, and frees it: all gradients never exist at once."""
    feed: FeedSpec = FeedSpec()
    """How batches reach the device."""
    data: DataSpec = DataSpec()

    @property
    def soaks(self) -> bool:
        """Whether it is a soak: a run over so many steps that memory which creeps would show."""
        return self.steps >= _SOAK_STEPS

    def __post_init__(self) -> None:
        """Ranges, and combinations that contradict each other.

        Raises:
            SpecError: packing with padding, unpadded rows of different lengths, checkpointing left to an absent `prepare` …
        """
        check_types(self)
        self._check_engine()
        for name in ("batch", "length", "steps"):
            refuse(getattr(self, name) < 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        refuse(self.length < 2, "length must be at least 2: the loss needs a next token.")
        refuse(not self.learning_rate > 0, f"learning_rate must be above 0, got {self.learning_rate}.")
        refuse(
            self.packing and self.padding != "none",
            f"Packing fills every block, so there is nothing to pad: packing=True contradicts padding={self.padding!r}.",
        )
        ragged = self.data.source != "random" and not self.packing and self.padding == "none"
        refuse(
            ragged,
            f"Rows of {self.data.source} differ in length: say padding='longest', padding='max_length' or packing=True.",
        )
        full = self.data.source == "random" and (self.packing or self.padding != "none")
        refuse(full, "Random rows are full already: drop packing and padding, or take data with lengths of its own.")
        untold = self.feed.tokenize == "fetch" and self.data.source in ("random", "trace")
        refuse(untold, f"tokenize='fetch' needs texts; source={self.data.source!r} has none: say tokenize='cached'.")
        refuse(
            self.checkpointing == "as-prepare-leaves-it" and not self.prepare,
            "checkpointing='as-prepare-leaves-it' needs prepare=True.",
        )

    def _check_engine(self) -> None:
        switched = [name for name, value in _SWITCHES.items() if getattr(self, name) != value]
        check_engine("finetune", self.engine)
        if self.engine != "tuned":
            refuse(
                bool(switched),
                f"The switch {', '.join(switched)} belongs to engine='tuned'; the engine is {self.engine!r}.",
            )
            return
        refuse(
            self.prepare, "engine='tuned' keeps every weight as it is: drop prepare=True, which casts them to float32."
        )
        refuse(self.precision != "pure", "engine='tuned' computes in the weights' dtype: say precision='pure'.")
        refuse(self.loss_chunk < 1, f"loss_chunk must be at least 1 row, got {self.loss_chunk}.")
        refuse(self.loss == "stock" and "loss_chunk" in switched, "loss_chunk belongs to loss='chunked' and 'liger'.")
        by_liger = "liger" in (self.fusion, self.loss)
        refuse(by_liger and self.compile == "layers", "Liger's kernels are compiled already: drop compile='layers'.")
        refuse(
            self.loss == "liger" and self.graph,
            "loss='liger' waits for the device in every step, which a CUDA graph cannot: say loss='chunked'.",
        )
        blocks = self.fusion == "blocks"
        refuse(blocks and self.compile == "layers", "fusion='blocks' has kernels of its own: drop compile='layers'.")
        refuse(blocks and self.loss == "stock", "fusion='blocks' never makes whole logits: say loss='chunked'.")
        refuse(blocks and self.loss == "liger", "fusion='blocks' has a loss of its own: say loss='chunked'.")
        again = self.checkpointing != "off"
        refuse(blocks and again, "fusion='blocks' recomputes by budget_bytes: say checkpointing='off'.")
        refuse(self.budget_bytes is not None and not blocks, "budget_bytes needs fusion='blocks', which can recompute.")
        refuse(
            self.budget_bytes is not None and self.budget_bytes < 1,
            f"budget_bytes must be at least 1, got {self.budget_bytes}.",
        )
        refuse(
            self.optimizer_in_backward and not (blocks and self.optimizer == "adamw-fused"),
            f"optimizer_in_backward=True is AdamW by the kernels of fusion='blocks'; got fusion={self.fusion!r}, optimizer={self.optimizer!r}.",
        )
        refuse(
            self.graph and (self.optimizer != "adamw-fused" or self.padding == "longest"),
            f"graph=True needs steps of one shape and optimizer='adamw-fused'; got padding={self.padding!r}, optimizer={self.optimizer!r}.",
        )


class CallableSpec(Strict, tag="callable", tag_field="kind", frozen=True, kw_only=True):
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
        check_types(self)
        refuse(
            not _FACTORY.fullmatch(self.factory), f"A factory is named 'package.module:function', got {self.factory!r}."
        )
        refuse(self.steps < 1, f"steps must be at least 1, got {self.steps}.")
        try:
            copy = msgspec.json.decode(msgspec.json.encode(self.arguments))
        except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            raise SpecError(f"Arguments of {self.factory} must be JSON values: {error}") from error
        refuse(
            copy != self.arguments,
            f"Arguments of {self.factory} change on the way through JSON: {self.arguments!r} came back as {copy!r}.",
        )


Workload = GenerateSpec | FinetuneSpec | CallableSpec
