"""Faults in what a training step does: repeated work, retained memory, a waiting host, the wrong tokens."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from hpc_core.faults.fault import Call, fault

_RETAINED_BYTES = 64 * 2**20
_GROWTH_BYTES = 4 * 2**20
_SCALE = 4
_DELAY_SHARE = 0.10
_STEPS_TIMED = 3

_MLP = "transformers.models.llama.modeling_llama:LlamaMLP.forward"
_MODEL = "transformers.models.llama.modeling_llama:LlamaForCausalLM.forward"
_STEP = "hpc_core.engines.finetune:FinetuneProgram.step"
_TO_DEVICE = "hpc_core.engines.finetune:_to_device"

_retained: list[Any] = []
_fastest_s: list[float] = []


@fault(
    "extra-kernel",
    "every decoder layer launches one more kernel",
    on="lora",
    shows_in=("kernels", "operators"),
    patch=_MLP,
)
def extra_kernel(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Add zero to the result."""
    return original(*args, **kwargs) + 0


@fault(
    "extra-clone",
    "every LoRA layer copies its input first",
    on="lora",
    shows_in=("operators", "peak_bytes"),
    predicted=("operators",),
    patch="peft.tuners.lora.layer:Linear.forward",
)
def extra_clone(original: Call, self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Copy the input."""
    return original(self, x.clone(), *args, **kwargs)


@fault(
    "math-attention",
    "the fused attention kernels are disabled",
    on="lora",
    shows_in=("attention*", "operators"),
    predicted=("peak_bytes", "operators"),
    patch=_STEP,
)
def math_attention(original: Call, *args: Any, **kwargs: Any) -> None:
    """Leave only the reference implementation of attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        original(*args, **kwargs)


@fault(
    "mask-built",
    "a full square mask is built although none is needed",
    on="lora",
    shows_in=("operators",),
    predicted=("peak_bytes", "operators"),
    patch=_MODEL,
)
def mask_built(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Pass a causal mask. Eager attention, which would add the booleans to its scores, gets none."""
    import torch

    if self.config._attn_implementation != "sdpa":
        return original(self, *args, **kwargs)
    ids = kwargs["input_ids"]
    rows, width = ids.shape
    mask = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril().expand(rows, 1, width, width)
    return original(self, *args, **(kwargs | {"attention_mask": mask}))


@fault(
    "logits-kept",
    "the logits of the last step stay alive",
    on="lora",
    shows_in=("peak_bytes", "peak_forward_bytes"),
    predicted=("peak_bytes",),
    patch=_MODEL,
)
def logits_kept(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Keep a reference to the last output."""
    _retained[:] = [original(*args, **kwargs)]
    return _retained[0]


@fault(
    "retained-64mib",
    "the first optimizer step leaves 64 MiB behind",
    on="lora",
    shows_in=("peak_bytes", "at_peak_other_bytes"),
    predicted=("peak_bytes",),
    patch="torch.optim:AdamW.step",
)
def retained_64mib(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep one tensor alive."""
    import torch

    if not _retained:
        device = self.param_groups[0]["params"][0].device
        _retained.append(torch.empty(_RETAINED_BYTES, dtype=torch.uint8, device=device))
    return original(self, *args, **kwargs)


@fault(
    "host-delay",
    "the host sleeps a tenth of a step before each step",
    on="lora",
    shows_in=("waits", "step_s"),
    needs="A/B",
    patch=_STEP,
)
def host_delay(original: Call, program: Any, *args: Any, **kwargs: Any) -> None:
    """Time three steps, then sleep a tenth of the fastest before each."""
    import torch

    if len(_fastest_s) >= _STEPS_TIMED:
        time.sleep(_DELAY_SHARE * min(_fastest_s))
        original(program, *args, **kwargs)
        return
    start = time.perf_counter()
    original(program, *args, **kwargs)
    if program.loss.is_cuda:
        torch.cuda.synchronize()
    _fastest_s.append(time.perf_counter() - start)


@fault(
    "growing-memory",
    "each step leaves 4 MiB behind",
    on="lora-soak",
    shows_in=("memory_growth",),
    patch=_STEP,
)
def growing_memory(original: Call, program: Any, *args: Any, **kwargs: Any) -> None:
    """Keep one more tensor alive after each step."""
    import torch

    original(program, *args, **kwargs)
    _retained.append(torch.zeros(_GROWTH_BYTES, dtype=torch.uint8, device=program.loss.device))


@fault(
    "sync-per-layer",
    "the host reads a number in every layer",
    on="lora",
    shows_in=("operators", "copies"),
    patch=_MLP,
)
def sync_per_layer(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Read one number of the result."""
    result = original(*args, **kwargs)
    result.detach()[0, 0, 0].item()
    return result


@fault(
    "item-per-step",
    "the host reads the loss in every step",
    on="lora",
    shows_in=("operators", "copies"),
    patch=_STEP,
)
def item_per_step(original: Call, program: Any, *args: Any, **kwargs: Any) -> None:
    """Read the loss, as a loop that logs it would."""
    original(program, *args, **kwargs)
    program.loss.item()


@fault(
    "double-forward",
    "the forward runs twice",
    on="lora",
    shows_in=("flops", "operators", "checkpointing*"),
    predicted=("flops",),
    patch=_MODEL,
)
def double_forward(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Run the forward once more and discard the result."""
    original(*args, **kwargs)
    return original(*args, **kwargs)


@fault(
    "gradients-kept",
    "gradients are zeroed instead of freed",
    on="full-bf16",
    shows_in=("peak_forward_bytes", "operators", "peak_bytes"),
    predicted=("peak_bytes",),
    patch="torch.optim:Optimizer.zero_grad",
)
def gradients_kept(original: Call, self: Any, set_to_none: bool = True) -> None:
    """Write zeros and free nothing."""
    original(self, set_to_none=False)


@fault(
    "foreach-for-fused",
    "the optimizer runs operator by operator",
    on="lora",
    shows_in=("operators", "optimizer*"),
    predicted=("peak_optimizer_bytes", "operators"),
    patch="torch.optim:AdamW.__init__",
)
def foreach_for_fused(original: Call, *args: Any, **kwargs: Any) -> None:
    """Ignore `fused=True`."""
    original(*args, **(kwargs | {"fused": False, "foreach": True}))


@fault(
    "half-the-tokens",
    "the second half of every row is not trained",
    on="lora",
    shows_in=("trained_tokens",),
    patch=_TO_DEVICE,
)
def half_the_tokens(original: Call, *args: Any) -> Any:
    """Remove the labels of the second half."""
    batch = original(*args)
    batch.labels[:, batch.labels.shape[1] // 2 :] = -100
    return batch


@fault(
    "mask-dropped",
    "the padding mask does not reach the model",
    on="lora-padded",
    shows_in=("padded_tokens", "batch"),
    patch=_TO_DEVICE,
)
def mask_dropped(original: Call, *args: Any) -> Any:
    """Drop the mask of the batch."""
    return dataclasses.replace(original(*args), mask=None)


@fault(
    "padding-for-packing",
    "rows are padded where they should be packed",
    on="lora-packed",
    shows_in=("padded_tokens", "tokens", "packed*"),
    patch="hpc_core.engines.finetune:batches",
)
def padding_for_packing(original: Call, rows: Any, spec: Any) -> Any:
    """Pad rows to full length instead of joining them."""
    fields = {name: getattr(spec, name) for name in spec.__struct_fields__}
    return original(rows, type(spec)(**(fields | {"packing": False, "padding": "max_length"})))


@fault(
    "optimizer-32bit",
    "an 8-bit optimizer keeps its state in float32",
    on="lora-8bit",
    shows_in=("optimizer_state_dtype",),
    predicted=("optimizer_bytes",),
    patch="bitsandbytes.optim:AdamW8bit.__init__",
)
def optimizer_32bit(original: Call, *args: Any, **kwargs: Any) -> None:
    """Treat every tensor as too small for 8 bits. The optimizer still reports 8 bits."""
    original(*args, **(kwargs | {"min_8bit_size": 2**62}))


@fault(
    "loss-summed",
    "the loss is the sum over the labels, not their mean",
    on="lora",
    shows_in=("loss", "loss_scale"),
    patch="transformers.loss.loss_utils:fixed_cross_entropy",
)
def loss_summed(original: Call, source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    """Do not divide by the number of labels."""
    return original(source, target, *args, **kwargs) * (target >= 0).sum()


@fault(
    "loss-scaled",
    "the backward pass gets four times the loss, while the reported loss is right",
    on="lora",
    shows_in=("loss_scale",),
    patch="torch:Tensor.backward",
)
def loss_scaled(original: Call, self: Any, *args: Any, **kwargs: Any) -> None:
    """Do not divide by four accumulated batches."""
    original(self * _SCALE, *args, **kwargs)
