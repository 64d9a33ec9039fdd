"""The tuned forward of a causal language model: embeddings, decoder layers without a mask, last norm, loss.

Rows are full or padded on the right, and attention is causal: no real token sees padding, and padding has no label. So no mask is made, and
flash attention keeps grouped queries. It must be so in a captured step too: while a CUDA graph is captured transformers (5.17, `is_tracing`) takes
another way and makes a whole (batch, 1, length, length) mask, which changes what torch.compile guards.
"""

from __future__ import annotations

from typing import Any

import torch

from hpc_core.case.errors import BuildError, library
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.engines.tuned.fused import Half, added_norm, fuse_halves, patch_linears
from hpc_core.engines.tuned.liger import fuse_by_liger, liger_cross_entropy, refuse_without_gpu
from hpc_core.engines.tuned.loss import chunked_cross_entropy
from hpc_core.engines.tuned.pointwise import Pointwise

_MARK = "_hpc_core_tuned"


class TunedForward:
    """Replaces a causal language model's forward. Called with `labels`, it returns the loss."""

    def __init__(self, causal: Any, workload: FinetuneSpec, run: Pointwise):
        self.causal = causal
        self.decoder: Any = causal.model
        self.workload = workload
        self.run = run
        self.halves: list[Half] = []
        self._angles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_: Any) -> Any:
        """input_ids and labels: (batch, length). Logits are there unless a loss in chunks is trained with; hidden states always."""
        hidden = self._hidden(input_ids)
        in_chunks = self.workload.loss != "stock"
        logits = None if in_chunks and self.causal.training else self.causal.lm_head(hidden)
        loss = None
        if labels is not None and in_chunks:
            loss = self._loss_in_chunks(hidden, labels)
        elif labels is not None:
            loss = self.causal.loss_function(logits=logits, labels=labels, vocab_size=self.causal.config.vocab_size)
        outputs = library("transformers.modeling_outputs", "The tuned training engine")
        return outputs.CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(hidden,))

    def _loss_in_chunks(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        head, rows = self.causal.lm_head.weight, self.workload.loss_chunk
        if self.workload.loss == "liger":
            return liger_cross_entropy(hidden, head, labels, least_rows=rows, called=self.run.called)
        return chunked_cross_entropy(hidden, head, labels, chunk=rows, run=self.run)

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        stream = self.decoder.embed_tokens(ids)
        cos, sin = self._angles_of(stream)
        if not self.halves:
            positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
            for layer in self.decoder.layers:
                stream = layer(
                    stream,
                    attention_mask=None,
                    position_ids=positions,
                    use_cache=False,
                    position_embeddings=(cos, sin),
                )
            return torch.as_tensor(self.decoder.norm(stream))
        return self._through_halves(stream, cos[0].unsqueeze(1), sin[0].unsqueeze(1))

    def _through_halves(self, embedded: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        stream, delta = embedded.reshape(-1, embedded.shape[-1]), None
        for half in self.halves:
            stream, delta = half.through(stream, delta, cos, sin)
        assert delta is not None
        last = self.decoder.norm
        return added_norm(stream, delta, last.weight, float(last.variance_epsilon), self.run).view(embedded.shape)

    def _angles_of(self, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, (1, length, width), made once a length: positions are 0, 1, 2 … in every row."""
        length = stream.shape[1]
        if length not in self._angles:
            with torch.no_grad():
                positions = torch.arange(length, device=stream.device).unsqueeze(0)
                self._angles[length] = self.decoder.rotary_emb(stream, position_ids=positions)
        return self._angles[length]


def tune(model: torch.nn.Module, workload: FinetuneSpec, run: Pointwise) -> TunedForward:
    """Install the tuned forward, with the workload's `fusion` and `compile`, in this model. `restore` undoes it.

    Raises:
        BuildError: the model's structure is not supported, or Liger's kernels are requested without a GPU.
        MissingLibraryError: liger-kernel is requested but not installed.
    """
    whole: Any = model
    causal: Any = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    decoder = getattr(causal, "model", None)
    missing = [name for name in ("embed_tokens", "layers", "norm", "rotary_emb") if not hasattr(decoder, name)]
    if missing or not hasattr(causal, "lm_head"):
        raise BuildError(
            f"engine='tuned' knows decoders with embed_tokens, layers, norm, rotary_emb and lm_head; {type(causal).__name__} "
            f"has no {', '.join(missing) or 'lm_head'}: say engine='stock'."
        )
    if workload.loss == "liger":
        refuse_without_gpu(causal.lm_head.weight.device, "loss='liger'")
        library("liger_kernel.transformers.functional", "loss='liger'")
    forward = TunedForward(causal, workload, run)
    if workload.fusion == "blocks":
        forward.halves = [half for layer in causal.model.layers for half in fuse_halves(layer, run)]
    elif workload.fusion == "liger":
        fuse_by_liger(causal, run.called)
    elif workload.fusion == "linears" and not sum(patch_linears(layer) for layer in causal.model.layers):
        raise BuildError("fusion='linears' found no layer with an adapter or 4-bit weights: nothing would be fused.")
    causal.forward = forward
    setattr(causal, _MARK, True)
    return forward


def restore(model: torch.nn.Module) -> None:
    """Restore the class's own, uncompiled forward of every module. A model that was not tuned does not change."""
    if not any(_MARK in vars(module) for module in model.modules()):
        return
    for module in model.modules():
        vars(module).pop("forward", None)
        vars(module).pop(_MARK, None)
        module._compiled_call_impl = None
