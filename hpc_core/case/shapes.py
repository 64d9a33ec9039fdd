"""Named model shapes: rows of `models.jsonl`, each a name and a `config.json` on one line. To add a model, add a line.

Values are those of the models' public configuration files on the hub; `tiny` is ours: every width is a multiple of 64 (NF4's
block), queries are grouped, and the vocabulary makes logits matter. `tiny-<name>` is a row's model with few and narrow layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from hpc_core.case.errors import SpecError


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sizes of a decoder-only transformer with gated MLP, RMS norm and grouped-query attention."""

    architecture: str
    """`model_type` of transformers: "llama" or "qwen2"."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    """Bias on the q, k and v projections (Qwen2)."""
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, float | str] | None = None

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return `(out_features, in_features)` of the seven linear layers of one decoder layer, by name."""
        heads, groups = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (heads, self.hidden_size),
            "k_proj": (groups, self.hidden_size),
            "v_proj": (groups, self.hidden_size),
            "o_proj": (self.hidden_size, heads),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }

    def parameter_count(self) -> int:
        """Return the parameters of the whole model. A tied head counts once."""
        layer = sum(rows * columns for rows, columns in self.linear_shapes().values()) + 2 * self.hidden_size
        if self.attention_bias:
            layer += (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size


_CLOSED = ("llama", "qwen2")
"""Values of `model_type` whose sizes `Shape` describes."""


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of the table."""

    name: str
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """What LoRA is attached to."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """eager where transformers implements no other."""
    config: dict[str, Any]
    """The contents of its config.json. Values that are left out are transformers' defaults."""
    tiny: dict[str, Any] = {}
    """What `tiny-<name>` sets beyond the rules of `shrunk`."""


_LAYERS = ("num_hidden_layers", "n_layer")

_MOST: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim"), 128),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim"), 256),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "full_attention_interval"), 4),
    **dict.fromkeys(("num_experts_per_tok", "sliding_window_pattern", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "query_pre_attn_scalar", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim"), 32),
    **dict.fromkeys(("v_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "state_size", "sliding_window", "chunk_size"), 16),
    "vocab_size": 1024,
    "num_heads": 8,
    "linear_num_value_heads": 4,
    "image_size": 56,
    "mm_tokens_per_image": 4,
    "n_group": 1,
    "topk_group": 1,
}
"""The largest value that a tiny model has for a key of a configuration."""


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the same parts, each small: at most four layers of 128 numbers a token."""
    small: dict[str, Any] = {key: min(value, _MOST[key]) for key, value in config.items() if key in _MOST and value}
    small |= {key: shrunk(value) for key, value in config.items() if key.endswith("_config")}
    layers = next((config[key] for key in _LAYERS if key in config), None)
    small |= {key: _few(value) for key, value in config.items() if isinstance(value, list) and len(value) == layers}
    if "num_key_value_heads" in config:
        alone = config["num_key_value_heads"] == config.get("num_attention_heads")
        small["num_key_value_heads"] = 4 if alone else 2
    if "vocab_size" in config:  # the model's own ids of special tokens lie beyond a tiny vocabulary
        small |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    return {**config, **small}


def _few(each_layer: list[Any]) -> list[Any]:
    """Return four layers of a list with an entry for each layer, every kind of layer among them."""
    kinds = [kind for place, kind in enumerate(each_layer) if kind not in each_layer[:place]]
    return (kinds * 4)[:4]


def _rows() -> dict[str, Model]:
    lines = Path(__file__).with_name("models.jsonl").read_bytes().splitlines()
    return {row.name: row for row in (msgspec.json.decode(line, type=Model) for line in lines)}


MODELS: dict[str, Model] = _rows()


def _closed(config: dict[str, Any]) -> Shape:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    sizes = {key: value for key, value in config.items() if key in Shape.__struct_fields__}
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    kind = {"architecture": config["model_type"], "attention_bias": config["model_type"] == "qwen2"}
    return msgspec.convert(sizes | {"head_dim": head_dim, "num_key_value_heads": groups} | kind, Shape)


SHAPES: dict[str, Shape] = {
    name: _closed(row.config) for name, row in MODELS.items() if row.config["model_type"] in _CLOSED
}
"""The rows whose weights, memory and FLOPs have a closed form."""
_TINY = "tiny-"


def model_named(name: str) -> Model:
    """Return the row of this name, or the small version that `tiny-<name>` means.

    Raises:
        SpecError: the name is unknown; the message lists the known ones.
    """
    if name in MODELS:
        return MODELS[name]
    row = MODELS.get(name.removeprefix(_TINY))
    if row is None:
        known = ", ".join(sorted(MODELS))
        msg = f"Unknown shape {name!r}. Known shapes: {known}. For another model use weights='folder', 'hub', 'config' or 'gguf' with its path."
        raise SpecError(msg)
    return msgspec.structs.replace(row, name=name, config=shrunk(row.config) | row.tiny)


def is_tiny(name: str | None) -> bool:
    """Return whether a shape is that of a model that a CPU trains in milliseconds."""
    return name is not None and (name == "tiny" or name.startswith(_TINY))


def layers_key(config: Mapping[str, Any]) -> str:
    """Return the key of a configuration that holds the number of decoder layers."""
    return next(key for key in _LAYERS if key in config)
