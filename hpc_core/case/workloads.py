"""What a case does: generate, fine-tune, or call a step of the user's own.

Frozen values. Contradictory fields are refused when a value is made.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from hpc_core.case.engines import check_engine
from hpc_core.case.parts import DataSpec, Strict, check_types, json_values, refuse

Checkpointing = Literal["off", "reentrant", "non-reentrant", "as-prepare-leaves-it"]
Optimizer = Literal["adamw-fused", "adamw-foreach", "adamw-8bit", "adamw-paged-8bit"]

_SOAK_STEPS = 100
"""A run of fewer steps is no soak: over a few steps, a leak of one tensor a step looks like a warm-up."""

_SWITCHES = {
    "loss": "stock",
    "loss_chunk": 512,
    "fusion": "off",
    "compile": "off",
    "graph": False,
    "budget_bytes": None,
    "optimizer_in_backward": False,
}
"""The options of the tuned training engine, with their defaults."""

_OWN_DECODING = {
    "kernels": "triton",
    "head": "plain",
    "cache_step": 256,
    "eos_every": None,
    "temperature": None,
    "top_k": None,
}
"""The options of the graph engine, with their defaults."""

ENGINE_FIELDS = {
    "finetune": ("engine", *_SWITCHES),
    "generate": ("engine", "kernels", "head", "cache_step"),
}
"""By workload, the fields that say how an engine does the work, not what the work is. Sampling and stopping early change the work."""

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_MOST_WORKERS = 64
_MOST_AHEAD = 64
_MOST_ROWS = 32
"""The graph engine's largest batch."""


class FeedSpec(Strict, frozen=True, kw_only=True):
    """The data path of a fine-tuning case. Every step gets the same batch whatever the path is."""

    way: Literal["resident", "loader"] = "resident"
    """resident: all batches are on the device before the first step. loader: torch's DataLoader delivers them one by one."""
    tokenize: Literal["cached", "fetch"] = "cached"
    """cached: tokenized, packed or padded once, then read from a file. fetch: texts are tokenized when their batch is requested."""
    workers: int = 0
    """Processes that make batches. 0 makes them in the training process."""
    pinned: bool = False
    """Batches are made in page-locked host memory, which a GPU copies asynchronously."""
    ahead: int = 0
    """How many batches are copied to the device ahead of their step, on a separate stream. 0 copies each batch when its step begins."""

    def __post_init__(self) -> None:
        """Check ranges, and refuse loader options without a loader.

        Raises:
            SpecError: a value outside its range, or a loader option with way="resident".
        """
        check_types(self)
        refuse(not 0 <= self.workers <= _MOST_WORKERS, f"workers must be 0 to {_MOST_WORKERS}, got {self.workers}.")
        refuse(not 0 <= self.ahead <= _MOST_AHEAD, f"ahead must be 0 to {_MOST_AHEAD}, got {self.ahead}.")
        if self.way == "resident":
            defaults = {"tokenize": "cached", "workers": 0, "pinned": False, "ahead": 0}
            given = [name for name, default in defaults.items() if getattr(self, name) != default]
            refuse(bool(given), f"{', '.join(given)} belongs to a feed with way='loader'; the way is 'resident'.")


class GenerateSpec(Strict, tag="generate", tag_field="kind", frozen=True, kw_only=True):
    """Generate exactly `new_tokens` tokens after each prompt, greedily by default."""

    batch: int = 1
    prompts: int = 3
    """Batches of prompts that are timed, one after another."""
    prompt_length: int | None = 100
    """Tokens in each prompt of random data. None if the data set has its own lengths."""
    new_tokens: int = 64
    cache: Literal["dynamic", "static", "off"] = "dynamic"
    compiled: bool = True
    """With a static cache, transformers compiles the forward on a GPU. False keeps it eager."""
    engine: str = "stock"
    """stock: transformers' `generate`. graph: a static cache and one CUDA graph per token (`hpc_core.engines`); eager without CUDA.
    Any other name: an engine that an installed package registers."""
    kernels: Literal["triton", "inductor", "torch"] = "triton"
    """What the graph engine runs on a GPU: fused Triton kernels, layers compiled by Inductor, or torch's kernels. A CPU runs torch's."""
    head: Literal["plain", "int8"] = "plain"
    """int8: the graph engine decodes with a copy of the head in int8, with one scale per row."""
    cache_step: int = 256
    """The graph engine rounds its cache up to a multiple of this many tokens, or of the power of two below 1/128 of the needed length if
    that is less."""
    eos_every: int | None = None
    """The graph engine checks every `eos_every` tokens whether all rows have ended, and then stops. None never checks, like
    `engine="stock"`."""
    temperature: float | None = None
    """The graph engine samples at this temperature, with the case's seed. None is greedy."""
    top_k: int | None = None
    """Sample among the `top_k` most likely tokens."""
    extrapolate_to: int | None = None
    """Also report the seconds for this many new tokens, marked as extrapolated."""
    data: DataSpec = DataSpec()

    def __post_init__(self) -> None:
        """Check ranges, and that the lengths are given exactly once.

        Raises:
            SpecError: a count below 1, a length given twice or not at all, an extrapolation to fewer tokens.
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
                f"{self.data.source} prompts bring their own lengths: use prompt_length=None.",
            )
        refuse(
            not self.compiled and self.cache != "static",
            f"compiled=False belongs to cache='static', which alone is compiled; the cache is {self.cache!r}.",
        )
        self._check_engine()
        too_short = self.extrapolate_to is not None and self.extrapolate_to < self.new_tokens
        refuse(too_short, f"extrapolate_to={self.extrapolate_to} is below new_tokens={self.new_tokens}.")

    def _check_engine(self) -> None:
        """Refuse the graph engine's options for other engines, and options that it does not have."""
        check_engine("generate", self.engine)
        if self.engine != "graph":
            given = [name for name, default in _OWN_DECODING.items() if getattr(self, name) != default]
            refuse(bool(given), f"{', '.join(given)} belongs to engine='graph'; the engine is {self.engine!r}.")
        else:
            refuse(
                self.cache != "dynamic",
                f"engine='graph' has its own static cache: remove cache={self.cache!r}.",
            )
            refuse(
                not 1 <= self.batch <= _MOST_ROWS,
                f"engine='graph' supports batches of 1 to {_MOST_ROWS}, got {self.batch}.",
            )
        for name in ("cache_step", "eos_every", "top_k"):
            value = getattr(self, name)
            refuse(value is not None and value < 1, f"{name} must be at least 1, got {value}.")
        refuse(
            self.temperature is not None and not self.temperature > 0,
            f"temperature must be above 0, got {self.temperature}; remove it for greedy decoding.",
        )
        refuse(self.top_k is not None and self.temperature is None, f"top_k={self.top_k} needs a temperature.")


class FinetuneSpec(Strict, tag="finetune", tag_field="kind", frozen=True, kw_only=True):
    """Train in a plain loop: forward, backward, optimizer, zero_grad."""

    batch: int = 4
    length: int = 512
    """Most tokens per row; with padding="max_length" or packing, exactly this many."""
    padding: Literal["none", "longest", "max_length"] = "none"
    packing: bool = False
    """Join rows and cut them into full blocks of `length`, without padding or mask."""
    checkpointing: Checkpointing = "off"
    """Gradient (activation) checkpointing. "as-prepare-leaves-it": the default of `prepare_model_for_kbit_training`."""
    prepare: bool = False
    """Call peft's `prepare_model_for_kbit_training` first: float32 norms, embeddings and head."""
    optimizer: Optimizer = "adamw-fused"
    learning_rate: float = 1e-5
    precision: Literal["pure", "autocast-bf16"] = "pure"
    """pure: compute in the weights' dtype. autocast-bf16: run the forward under autocast."""
    steps: int = 10
    """Timed steps, after warm-up. If there are enough of them (`soaks`), memory must stay flat over them."""
    epoch_rows: int | None = None
    """Rows of the epoch whose time is extrapolated. None if the data set has its own size."""
    engine: str = "stock"
    """stock: the libraries' own forward and loss. tuned: `hpc_core.engines.tuned`, whose options are the fields below. Any other
    name: an engine that an installed package registers."""
    loss: Literal["stock", "chunked", "liger"] = "stock"
    """chunked: head and cross-entropy in one, some rows at a time, so that the whole logits never exist. liger: the same by liger-kernel."""
    loss_chunk: int = 512
    """Rows that the chunked loss takes at a time. Liger rounds it up to a power of two."""
    fusion: Literal["off", "linears", "blocks", "liger"] = "off"
    """linears: each linear layer with its adapter is one function, which dequantizes once per use. blocks: also norm, projections and
    gates of a decoder layer, with our own kernels and without a mask. liger: norms, rotations and gates by liger-kernel, on a GPU."""
    compile: Literal["off", "layers"] = "off"
    """layers: compile each decoder layer with torch.compile."""
    graph: bool = False
    """Capture the whole step, optimizer included, as one CUDA graph."""
    budget_bytes: int | None = None
    """Limit of a step's peak memory. As many halves of decoder layers as necessary are recomputed in the backward pass."""
    optimizer_in_backward: bool = False
    """AdamW updates a weight as soon as its gradient is complete and frees the gradient, so that never all gradients exist at once."""
    feed: FeedSpec = FeedSpec()
    """How batches reach the device."""
    data: DataSpec = DataSpec()

    @property
    def soaks(self) -> bool:
        """Whether this is a soak: enough steps that a memory leak would show."""
        return self.steps >= _SOAK_STEPS

    def __post_init__(self) -> None:
        """Check ranges and combinations.

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
            f"Rows of {self.data.source} differ in length: use padding='longest', padding='max_length' or packing=True.",
        )
        full = self.data.source == "random" and (self.packing or self.padding != "none")
        refuse(full, "Random rows are full already: remove packing and padding, or use data with its own lengths.")
        no_texts = self.feed.tokenize == "fetch" and self.data.source in ("random", "trace")
        refuse(no_texts, f"tokenize='fetch' needs texts; source={self.data.source!r} has none: use tokenize='cached'.")
        refuse(
            self.checkpointing == "as-prepare-leaves-it" and not self.prepare,
            "checkpointing='as-prepare-leaves-it' needs prepare=True.",
        )

    def _check_engine(self) -> None:
        given = [name for name, value in _SWITCHES.items() if getattr(self, name) != value]
        check_engine("finetune", self.engine)
        if self.engine != "tuned":
            refuse(
                bool(given),
                f"The option {', '.join(given)} belongs to engine='tuned'; the engine is {self.engine!r}.",
            )
            return
        refuse(self.prepare, "engine='tuned' does not cast weights: remove prepare=True, which casts them to float32.")
        refuse(self.precision != "pure", "engine='tuned' computes in the weights' dtype: use precision='pure'.")
        refuse(self.loss_chunk < 1, f"loss_chunk must be at least 1 row, got {self.loss_chunk}.")
        refuse(self.loss == "stock" and "loss_chunk" in given, "loss_chunk belongs to loss='chunked' and 'liger'.")
        by_liger = "liger" in (self.fusion, self.loss)
        refuse(by_liger and self.compile == "layers", "Liger's kernels are compiled already: remove compile='layers'.")
        refuse(
            self.loss == "liger" and self.graph,
            "loss='liger' synchronizes in every step, which a CUDA graph cannot do: use loss='chunked'.",
        )
        blocks = self.fusion == "blocks"
        refuse(blocks and self.compile == "layers", "fusion='blocks' has its own kernels: remove compile='layers'.")
        refuse(blocks and self.loss == "stock", "fusion='blocks' never makes whole logits: use loss='chunked'.")
        refuse(blocks and self.loss == "liger", "fusion='blocks' has its own loss: use loss='chunked'.")
        again = self.checkpointing != "off"
        refuse(blocks and again, "fusion='blocks' recomputes by budget_bytes: use checkpointing='off'.")
        refuse(self.budget_bytes is not None and not blocks, "budget_bytes needs fusion='blocks', which can recompute.")
        refuse(
            self.budget_bytes is not None and self.budget_bytes < 1,
            f"budget_bytes must be at least 1, got {self.budget_bytes}.",
        )
        refuse(
            self.optimizer_in_backward and not (blocks and self.optimizer == "adamw-fused"),
            f"optimizer_in_backward=True needs optimizer='adamw-fused' and fusion='blocks', whose kernels do it; got fusion={self.fusion!r}, optimizer={self.optimizer!r}.",
        )
        refuse(
            self.graph and (self.optimizer != "adamw-fused" or self.padding == "longest"),
            f"graph=True needs steps of one shape and optimizer='adamw-fused'; got padding={self.padding!r}, optimizer={self.optimizer!r}.",
        )


class CallableSpec(Strict, tag="callable", tag_field="kind", frozen=True, kw_only=True):
    """A step of the user's own: an importable factory that returns a callable, which is called once per step."""

    factory: str
    """`package.module:function`. The worker calls it with `arguments`, and it returns the step."""
    arguments: dict[str, Any] = {}
    """JSON values, so that the case equals its JSON."""
    steps: int = 10
    device: Literal["any", "cuda"] = "any"

    def __post_init__(self) -> None:
        """Check the factory's name and its arguments.

        Raises:
            SpecError: the name is not importable, or an argument is not a JSON value.
        """
        check_types(self)
        refuse(
            not _FACTORY.fullmatch(self.factory),
            f"A factory is given as 'package.module:function', got {self.factory!r}.",
        )
        refuse(self.steps < 1, f"steps must be at least 1, got {self.steps}.")
        json_values(f"Arguments of {self.factory}", self.arguments)


Workload = GenerateSpec | FinetuneSpec | CallableSpec
