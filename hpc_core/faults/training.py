"""Faults in what a training step does: work twice, memory kept, the host waiting, the wrong tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import torch

from hpc_core.builders.libraries import library
from hpc_core.engines import finetune
from hpc_core.faults.fault import Injection
from hpc_core.faults.replacing import replace

_RETAINED_BYTES = 64 * 2**20
_GROWTH_BYTES = 4 * 2**20
_SCALE = 4
_DELAY_SHARE = 0.10
_STEPS_TIMED = 3


def _llama() -> Any:
    return library("transformers.models.llama.modeling_llama", "This fault")


def _mlp_result(injection: Injection, change: Any) -> None:
    """Every decoder layer's MLP passes its result through `change`."""

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            return change(result) if injection.hit() else result

        return forward

    replace(_llama().LlamaMLP, "forward", make)


def extra_kernel(injection: Injection) -> None:
    """Every decoder layer adds zero to its result."""
    _mlp_result(injection, lambda result: result + 0)


def sync_per_layer(injection: Injection) -> None:
    """Every decoder layer reads one number of its result on the host."""

    def change(result: torch.Tensor) -> torch.Tensor:
        result.detach()[0, 0, 0].item()
        return result

    _mlp_result(injection, change)


def extra_clone(injection: Injection) -> None:
    """peft's LoRA layer copies its input."""
    layer: Any = library("peft.tuners.lora.layer", "This fault")

    def make(original: Any) -> Any:
        def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return original(self, x.clone() if injection.hit() else x, *args, **kwargs)

        return forward

    replace(layer.Linear, "forward", make)


def _around_step(injection: Injection, context: Any) -> None:
    def make(original: Any) -> Any:
        def step(self: Any, *args: Any, **kwargs: Any) -> None:
            with context(self) if injection.hit() else contextlib.nullcontext():
                original(self, *args, **kwargs)

        return step

    replace(finetune.FinetuneProgram, "step", make)


def math_attention(injection: Injection) -> None:
    """Only the reference implementation of attention is left."""
    attention: Any = library("torch.nn.attention", "This fault")
    _around_step(injection, lambda _: attention.sdpa_kernel(attention.SDPBackend.MATH))


def item_per_step(injection: Injection) -> None:
    """The loop logs the loss in every step."""

    @contextlib.contextmanager
    def logging(program: Any) -> Any:
        yield
        program.loss.item()

    _around_step(injection, logging)


def host_delay(injection: Injection) -> None:
    """After three steps of warm-up, whose fastest says what a step takes, the host sleeps a tenth of it before each step."""
    took_s: list[float] = []

    @contextlib.contextmanager
    def delayed(program: Any) -> Any:
        if len(took_s) >= _STEPS_TIMED:
            time.sleep(_DELAY_SHARE * min(took_s))
            yield
            return
        begun = time.perf_counter()
        yield
        if program.loss.is_cuda:
            torch.cuda.synchronize()
        took_s.append(time.perf_counter() - begun)

    _around_step(injection, delayed)


def growing_memory(injection: Injection) -> None:
    """Each step leaves 4 MiB behind."""
    kept: list[torch.Tensor] = []

    @contextlib.contextmanager
    def leaking(program: Any) -> Any:
        yield
        kept.append(torch.zeros(_GROWTH_BYTES, dtype=torch.uint8, device=program.loss.device))

    _around_step(injection, leaking)


def retained_tensor(injection: Injection) -> None:
    """The first optimizer step keeps a tensor alive for good."""
    kept: list[torch.Tensor] = []

    def make(original: Any) -> Any:
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if injection.hit() and not kept:
                device = self.param_groups[0]["params"][0].device
                kept.append(torch.empty(_RETAINED_BYTES, dtype=torch.uint8, device=device))
            return original(self, *args, **kwargs)

        return step

    replace(torch.optim.AdamW, "step", make)


def _model_call(injection: Injection, call: Any) -> None:
    """`call(original, self, args, kwargs)` in place of the causal model's forward."""

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if injection.hit():
                return call(original, self, args, kwargs)
            return original(self, *args, **kwargs)

        return forward

    replace(_llama().LlamaForCausalLM, "forward", make)


def mask_built(injection: Injection) -> None:
    """The square mask is always built."""

    def call(original: Any, self: Any, args: Any, kwargs: Any) -> Any:
        if (
            self.config._attn_implementation != "sdpa"
        ):  # eager attention adds its mask: a square of booleans is no mask there
            return original(self, *args, **kwargs)
        ids = kwargs["input_ids"]
        rows, width = ids.shape
        mask = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril().expand(rows, 1, width, width)
        return original(self, *args, **(kwargs | {"attention_mask": mask}))

    _model_call(injection, call)


def logits_kept(injection: Injection) -> None:
    """The last outputs stay in a list."""
    kept: list[Any] = []

    def call(original: Any, self: Any, args: Any, kwargs: Any) -> Any:
        kept[:] = [original(self, *args, **kwargs)]
        return kept[0]

    _model_call(injection, call)


def double_forward(injection: Injection) -> None:
    """The forward is run once more, and its result thrown away."""

    def call(original: Any, self: Any, args: Any, kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    _model_call(injection, call)


def half_the_tokens(injection: Injection) -> None:
    """The collator leaves the second half of every row without labels."""

    def make(original: Any) -> Any:
        def to_device(*args: Any) -> Any:
            batch = original(*args)
            if injection.hit():
                batch.labels[:, batch.labels.shape[1] // 2 :] = -100
            return batch

        return to_device

    replace(finetune, "_to_device", make)


def mask_dropped(injection: Injection) -> None:
    """The collator forgets the padding mask."""

    def make(original: Any) -> Any:
        def to_device(*args: Any) -> Any:
            batch = original(*args)
            return dataclasses.replace(batch, mask=None) if injection.hit() else batch

        return to_device

    replace(finetune, "_to_device", make)


def gradients_kept(injection: Injection) -> None:
    """zero_grad writes zeros and frees nothing."""

    def make(original: Any) -> Any:
        def zero_grad(self: Any, set_to_none: bool = True) -> None:
            original(self, set_to_none=False if injection.hit() else set_to_none)

        return zero_grad

    replace(torch.optim.Optimizer, "zero_grad", make)


def foreach_for_fused(injection: Injection) -> None:
    """AdamW forgets that it was to be fused."""

    def make(original: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            changed = {"fused": False, "foreach": True} if injection.hit() else {}
            original(self, *args, **(kwargs | changed))

        return init

    replace(torch.optim.AdamW, "__init__", make)


def padding_for_packing(injection: Injection) -> None:
    """The data path pads rows to full length in place of joining them."""

    def make(original: Any) -> Any:
        def batches(rows: Any, spec: Any) -> Any:
            if not injection.hit():
                return original(rows, spec)
            fields = {name: getattr(spec, name) for name in spec.__struct_fields__}
            return original(rows, type(spec)(**(fields | {"packing": False, "padding": "max_length"})))

        return batches

    replace(finetune, "batches", make)


def optimizer_32bit(injection: Injection) -> None:
    """bitsandbytes' optimizer takes every tensor for one that is too small for 8 bits; it still says that it has 8."""
    bnb: Any = library("bitsandbytes", "This fault")

    def make(original: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            changed = {"min_8bit_size": 2**62} if injection.hit() else {}
            original(self, *args, **(kwargs | changed))

        return init

    replace(bnb.optim.AdamW8bit, "__init__", make)


def loss_summed(injection: Injection) -> None:
    """transformers' loss function forgets to divide by the number of labels."""
    losses: Any = library("transformers.loss.loss_utils", "This fault")

    def make(original: Any) -> Any:
        def cross_entropy(source: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = original(source, target, *args, **kwargs)
            return loss * (target >= 0).sum() if injection.hit() else loss

        return cross_entropy

    replace(losses, "fixed_cross_entropy", make)


def loss_scaled(injection: Injection) -> None:
    """The loop forgets to divide by its four accumulated batches; the loss that it reports is right."""

    def make(original: Any) -> Any:
        def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            original(self * _SCALE if injection.hit() else self, *args, **kwargs)

        return backward

    replace(torch.Tensor, "backward", make)
