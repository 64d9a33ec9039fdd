"""Faults in what the host does: Python that runs more, calls that cost more, objects that stay, and waiting.

Twenty of them; `cache-emptied` needs a GPU. Ten are held back: no tolerance and no rule was chosen by looking at them.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib
import json
import os
import threading
import time
import warnings
from typing import Any

from hpc_core.faults.fault import Call, fault

_CAUSAL = "transformers.models.llama.modeling_llama:LlamaForCausalLM.forward"
_LAYER = "transformers.models.llama.modeling_llama:LlamaDecoderLayer.forward"
_UPDATE = "transformers.generation.utils:GenerationMixin._update_model_kwargs_for_generation"
_STEP = "hpc_core.engines.finetune:FinetuneProgram.step"
_TURNS = 500
_WAIT_S = 0.02
"""Longer than a token and than a step of the tiny cases."""
_BLOCK = bytes(32 * 2**20)
_kept: list[Any] = []
HELD_BACK = (
    "exceptions-caught",
    "modules-imported",
    "mask-in-lists",
    "objects-dropped",
    "losses-kept",
    "garbage-collected",
    "weights-hashed",
    "lock-waited-for",
    "pipe-read",
    "step-sleep",
)
"""Written after the tolerances and the rule for wall time were fixed."""


@fault(
    "layer-spin",
    "every layer runs a Python loop of 500 turns",
    on="generate-bf16",
    shows_in=("bytecodes", "bytecodes_decode"),
    predicted=("bytecodes", "bytecodes_decode"),
    patch=_LAYER,
)
def layer_spin(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Count to 500 before each layer."""
    for _ in range(_TURNS):
        pass
    return original(*args, **kwargs)


@fault(
    "config-copied",
    "every token copies the generation config",
    on="generate-bf16",
    shows_in=("bytecodes_decode", "python_calls_decode"),
    predicted=("bytecodes_decode", "python_calls_decode"),
    patch=_UPDATE,
)
def config_copied(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Copy the configuration before each token's inputs are made."""
    copy.deepcopy(self.generation_config)
    return original(self, *args, **kwargs)


@fault(
    "weights-looked-up",
    "every token looks every parameter up by its name",
    on="generate-bf16",
    shows_in=("bytecodes_decode", "python_calls_decode"),
    predicted=("bytecodes_decode", "python_calls_decode"),
    patch=_UPDATE,
)
def weights_looked_up(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Make a dictionary of them, where one would do."""
    dict(self.named_parameters())
    return original(self, *args, **kwargs)


@fault(
    "c-calls",
    "every layer asks a tensor a thousand times for its dimensions",
    on="generate-bf16",
    shows_in=("c_calls", "c_calls_decode"),
    predicted=("c_calls", "c_calls_decode"),
    patch=_LAYER,
)
def c_calls(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Call into C a thousand times from one line."""
    for value in (args[1],) * 1000:
        value.dim()
    return original(*args, **kwargs)


@fault(
    "states-kept",
    "every forward leaves a list behind",
    on="generate-bf16",
    shows_in=("kept_objects",),
    patch=_CAUSAL,
)
def states_kept(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Keep a small list for each forward, as a cache without a bound does."""
    _kept.append([len(_kept)])
    return original(*args, **kwargs)


@fault(
    "cache-emptied",
    "every forward empties the allocator's cache",
    on="generate-bf16",
    shows_in=("device_frees", "device_allocations"),
    seen_on="gpu",
    patch=_CAUSAL,
)
def cache_emptied(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Free what the allocator caches, so that the next layers allocate it again."""
    import torch

    torch.cuda.empty_cache()
    return original(*args, **kwargs)


@fault(
    "step-logged",
    "every optimizer step formats all hyperparameters as text",
    on="lora",
    shows_in=("bytecodes", "python_calls"),
    predicted=("bytecodes", "python_calls"),
    patch="torch.optim:AdamW.step",
)
def step_logged(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Write the optimizer's groups as JSON, with the sizes of all their tensors."""
    groups = [{**group, "params": [list(each.shape) for each in group["params"]]} for group in self.param_groups]
    json.dumps(groups, default=str, indent=1)
    return original(self, *args, **kwargs)


@fault(
    "norms-in-python",
    "every step adds up the sizes of all parameters in Python",
    on="lora",
    shows_in=("bytecodes",),
    predicted=("bytecodes",),
    patch="torch.optim:Optimizer.zero_grad",
)
def norms_in_python(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Multiply every parameter's shape by hand."""
    total = 0
    for group in self.param_groups:
        for each in group["params"]:
            count = 1
            for size in each.shape:
                count *= size
            total += count
    return original(self, *args, **kwargs)


@fault(
    "warnings-formatted",
    "every layer raises a warning that is ignored",
    on="generate-bf16",
    shows_in=("bytecodes", "python_calls"),
    predicted=("bytecodes", "python_calls"),
    patch=_LAYER,
)
def warnings_formatted(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Warn ten times before each layer, as a deprecation does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(10):
            warnings.warn(f"argument {number} is deprecated", FutureWarning, stacklevel=1)
    return original(*args, **kwargs)


@fault(
    "processor-in-python",
    "every token's logits pass through Python numbers",
    on="generate-bf16",
    shows_in=("bytecodes_decode",),
    patch=_UPDATE,
)
def processor_in_python(original: Call, self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Look for the largest logit in Python, as a hand-made logits processor does."""
    best = None
    for value in outputs.logits[0, -1].tolist():
        if best is None or value > best:
            best = value
    return original(self, outputs, *args, **kwargs)


@fault(
    "exceptions-caught",
    "every layer raises and catches a hundred exceptions",
    on="generate-bf16",
    shows_in=("bytecodes", "bytecodes_decode"),
    predicted=("bytecodes", "bytecodes_decode"),
    patch=_LAYER,
)
def exceptions_caught(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Look for an attribute that is not there."""
    for _ in range(100):
        try:
            raise AttributeError("past_key_value")
        except AttributeError:
            continue
    return original(*args, **kwargs)


@fault(
    "modules-imported",
    "every token imports twenty modules again",
    on="generate-bf16",
    shows_in=("python_calls_decode", "bytecodes_decode"),
    predicted=("python_calls_decode", "bytecodes_decode"),
    patch=_UPDATE,
)
def modules_imported(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Import inside the loop what is imported already."""
    for _ in range(20):
        importlib.import_module("transformers.cache_utils")
    return original(self, *args, **kwargs)


@fault(
    "mask-in-lists",
    "every token builds a causal mask of 64 by 64 from Python lists",
    on="generate-bf16",
    shows_in=("bytecodes_decode",),
    predicted=("bytecodes_decode",),
    patch=_UPDATE,
)
def mask_in_lists(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Build the mask and drop it."""
    [[column <= row for column in range(64)] for row in range(64)]
    return original(self, *args, **kwargs)


@fault(
    "objects-dropped",
    "every layer makes ten thousand objects and drops them",
    on="lora",
    shows_in=("bytecodes",),
    predicted=("bytecodes",),
    patch=_LAYER,
)
def objects_dropped(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Allocate without keeping anything."""
    [(number,) for number in range(10_000)]
    return original(*args, **kwargs)


@fault(
    "losses-kept",
    "every step keeps a record of itself",
    on="lora",
    shows_in=("kept_objects",),
    patch="torch.optim:AdamW.step",
)
def losses_kept(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Append to a log that nobody reads."""
    _kept.append({"step": [len(_kept)]})
    return original(self, *args, **kwargs)


@fault(
    "garbage-collected",
    "every token collects garbage",
    on="generate-bf16",
    shows_in=("decode_token_s", "query_s"),
    needs="--jobs 1",
    patch=_UPDATE,
)
def garbage_collected(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Walk all objects of the process: one call into C."""
    gc.collect()
    return original(self, *args, **kwargs)


@fault(
    "weights-hashed",
    "every token hashes 32 MiB",
    on="generate-bf16",
    shows_in=("decode_token_s", "query_s"),
    needs="--jobs 1",
    patch=_UPDATE,
)
def weights_hashed(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Spend the time in one call into C."""
    hashlib.sha256(_BLOCK)
    return original(self, *args, **kwargs)


@fault(
    "lock-waited-for",
    "every token waits 20 ms for a lock that another thread holds",
    on="generate-bf16",
    shows_in=("waits", "decode_token_s", "query_s", "python_calls_decode"),
    needs="--jobs 1",
    patch=_UPDATE,
)
def lock_waited_for(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Ask for a lock while a thread sleeps with it."""
    lock = threading.Lock()
    lock.acquire()
    threading.Timer(_WAIT_S, lock.release).start()
    with lock:
        return original(self, *args, **kwargs)


@fault(
    "pipe-read",
    "every step reads from a pipe that is written to 50 ms later",
    on="lora",
    shows_in=("waits", "step_s", "python_calls"),
    needs="--jobs 1",
    patch=_STEP,
)
def pipe_read(original: Call, program: Any, *args: Any, **kwargs: Any) -> None:
    """Block in a read, as a loader without prefetch does."""
    source, sink = os.pipe()
    writer = threading.Timer(0.05, os.write, (sink, b"batch"))
    writer.start()
    os.read(source, 5)
    writer.join()
    os.close(source)
    os.close(sink)
    original(program, *args, **kwargs)


@fault(
    "step-sleep",
    "every step sleeps 100 ms",
    on="lora",
    shows_in=("waits", "step_s"),
    needs="--jobs 1",
    patch=_STEP,
)
def step_sleep(original: Call, program: Any, *args: Any, **kwargs: Any) -> None:
    """Sleep before each step."""
    time.sleep(0.1)
    original(program, *args, **kwargs)
