"""Named model shapes: the sizes in a `config.json`. Values are those of the models' public configuration files on the hub; `tiny` is ours."""

from __future__ import annotations

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


_LLAMA3_ROPE: dict[str, float | str] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, Shape] = {
    "llama-3.2-1b": Shape(
        architecture="llama",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={**_LLAMA3_ROPE, "factor": 32.0},
    ),
    "llama-3.2-3b": Shape(
        architecture="llama",
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={**_LLAMA3_ROPE, "factor": 32.0},
    ),
    "llama-3.1-8b": Shape(
        architecture="llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={**_LLAMA3_ROPE, "factor": 8.0},
    ),
    "llama-2-13b": Shape(
        architecture="llama",
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
        vocab_size=32000,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
    ),
    "qwen2.5-1.5b": Shape(
        architecture="qwen2",
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
        attention_bias=True,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
    ),
    "smollm2-135m": Shape(
        architecture="llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
    ),
    # Ours: every width a multiple of 64 (NF4's block), grouped queries, a vocabulary that makes logits matter.
    "tiny": Shape(
        architecture="llama",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=1024,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
    ),
}


def shape(name: str) -> Shape:
    """Return the named shape.

    Raises:
        SpecError: the name is unknown; the message lists the known ones.
    """
    try:
        return SHAPES[name]
    except KeyError:
        known = ", ".join(sorted(SHAPES))
        msg = f"Unknown shape {name!r}. Known shapes: {known}. For another model use weights='folder', 'hub' or 'gguf' with its path."
        raise SpecError(msg) from None
