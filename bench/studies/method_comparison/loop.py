"""One row of peft's method comparison on the fake GPU: its own training loop, as far as memory depends on it.

python -m bench.studies.method_comparison.loop EXPERIMENT LENGTH [adapter-on] [freeze=NAME] [shape=NAME] prints what was predicted
as JSON. EXPERIMENT is a folder below method_comparison/MetaMathQA/experiments of a checkout of peft. "adapter-on" leaves out the
evaluation under `disable_adapter()`; "freeze=NAME" trains no tensor whose name holds NAME.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hpc_core.predict import shim

DEFAULTS = "default_training_params.json"
PARAMETERS = "training_params.json"
SHAPE = "llama-3.2-3b"
GPU = "RTX 4090"
"""The published table is of an L40S, which has the same compute capability: kernels and workspaces are chosen by that."""
_WIKI_TOKENS = 768
_STEPS = 3
"""The first step makes the optimizer's state, and in the later ones the allocator reserves no more."""


def settings(experiment: Path) -> dict[str, Any]:
    """Return an experiment's training parameters: the defaults of all, and its own."""
    found: dict[str, Any] = json.loads((experiment.parents[2] / DEFAULTS).read_text())
    own = experiment / PARAMETERS
    return found | (json.loads(own.read_text()) if own.is_file() else {})


def predict(
    experiment: Path, length: int, *, disable_adapter: bool = True, freeze: str = "", shape: str = SHAPE
) -> dict[str, Any]:
    """Run the loop on rows of `length` tokens, and return bytes: peak allocated and reserved, and held after a step."""
    import torch

    from hpc_core.predict.fake_gpu import fake_gpu
    from hpc_core.predict.own_code import own_code
    from hpc_core.record.gpus import gpu_named

    with fake_gpu(gpu_named(GPU)) as (watch, _), own_code(watch, experiment.parent.name):
        given = settings(experiment)
        model, trained = _model(experiment, given, shape)
        optimizer = _optimizer(model, given)
        if disable_adapter and trained:
            model.eval()
            with model.disable_adapter(), torch.inference_mode():
                ids = torch.ones(given["batch_size"], _WIKI_TOKENS, dtype=torch.long)
                model(**_on_gpu({"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
        model.train()
        for name, weight in model.named_parameters():
            weight.requires_grad_(weight.requires_grad and not (freeze and freeze in name))
        held = 0
        outputs: Any = None
        for step in range(1, _STEPS + 1):
            batch = _batch(given["batch_size"], length)
            optimizer.zero_grad()
            outputs = model(**batch, num_items_in_batch=batch["attention_mask"].sum().item())
            outputs.loss.backward()
            if given["grad_norm_clip"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), given["grad_norm_clip"])
            optimizer.step()
            if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
                model.base_model.update_and_allocate(step)
            outputs.loss.item()
            held = watch.allocator.allocated
        del outputs
        return {
            "peak": watch.allocator.peak_allocated,
            "reserved": watch.allocator.peak_reserved,
            "held": held,
            "trainable": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        }


def _model(experiment: Path, given: dict[str, Any], shape: str) -> tuple[Any, bool]:
    """Return the model, and whether peft adapts it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from hpc_core.builders.causal_lm import model_config
    from hpc_core.case.shapes import SHAPES

    config = model_config(SHAPES[shape], given["dtype"], "sdpa")
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, given["dtype"]), attn_implementation="sdpa"
        )
    if not (experiment / "adapter_config.json").is_file():
        return base, False
    adapter = peft.PeftConfig.from_pretrained(str(experiment))
    return peft.get_peft_model(base, adapter, autocast_adapter_dtype=given["autocast_adapter_dtype"]), True


def _optimizer(model: Any, given: dict[str, Any]) -> Any:
    import torch
    from peft import optimizers

    kind, options = given["optimizer_type"], given["optimizer_kwargs"]
    if kind == "lora-fa":
        return optimizers.create_lorafa_optimizer(model, **options)
    if kind == "riemannian":
        return optimizers.create_riemannian_optimizer(model, optimizer_cls=torch.optim.AdamW, **options)
    return getattr(torch.optim, kind)(model.parameters(), **options)


def _batch(rows: int, length: int) -> dict[str, Any]:
    """Return a bucket's batch: rows of nearly equal lengths, padded to the longest."""
    import torch

    ids = torch.ones(rows, length, dtype=torch.long)
    mask = torch.tensor([[1] * (length - row) + [0] * row for row in range(rows)])
    labels = ids.clone()
    for row in range(1, rows):
        labels[row, length - row + 1 :] = -100
    return _on_gpu({"input_ids": ids, "attention_mask": mask, "labels": labels})


def _on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: rows.to("cuda") for name, rows in batch.items()}


if __name__ == "__main__":
    shim.load()
    folder, tokens, *words = sys.argv[1:]
    options = dict(word.split("=") for word in words if "=" in word)
    found = predict(Path(folder), int(tokens), disable_adapter="adapter-on" not in words, **options)
    sys.stdout.write(json.dumps(found))
