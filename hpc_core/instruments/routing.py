"""Count the tokens that each expert of a mixture of experts gets, and mark the metrics that depend on it.

Routing depends on values: on data, seed, precision and every trained weight. Counts and bytes of a step do not, where all experts
are one grouped product; its time does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import torch

from hpc_core.instruments.places import path_of
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import definition_of, metric
from hpc_core.record.record import Metric

_MARK = "depends on routing"


def routing(
    model: Any, experts: Mapping[str, torch.nn.Module], step: Callable[[], object], found: Findings
) -> Findings:
    """Run one step; return the tokens of each expert, and the metrics that depend on routing, each with a note.

    Args:
        model: a language model of transformers.
        experts: its modules that hold all experts of a layer, by name.
        step: runs every layer at least once. A layer's first call counts, so nothing counts twice where layers are recomputed.
        found: the metrics so far.
    """
    with _watching(experts) as counts:
        step()
    if not counts:
        return Findings()
    layers = {name: each.tolist() for name, each in counts.items()}
    busiest, tokens = max(layers.items(), key=lambda layer: max(layer[1]))
    mean = sum(tokens) / len(tokens)
    totals = [float(sum(column)) for column in zip(*layers.values(), strict=True)] if _even(layers) else None
    note = (
        f"expert {tokens.index(max(tokens))} of {path_of(busiest)}; the mean of its {len(tokens)} experts is {mean:.1f}"
    )
    metrics = {"expert_tokens_most": metric("expert_tokens_most", max(tokens), note=note)}
    if totals is not None:
        listed = f"each expert's tokens in all {len(layers)} layers; the value is their median"
        metrics["expert_tokens"] = metric("expert_tokens", samples=totals, note=listed)
    looped = getattr(model.config.get_text_config(), "_experts_implementation", None) == "eager"
    marked = {name: _marked(each) for name, each in found.metrics.items() if _depends(name, each, looped=looped)}
    return Findings(metrics=metrics | marked)


@contextlib.contextmanager
def _watching(experts: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Count the tokens of each expert in the first call of each module, from the indices that the module gets."""
    counts: dict[str, torch.Tensor] = {}

    def watch(name: str, module: Any) -> Callable[..., None]:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            chosen = [value for value in (*args, *kwargs.values()) if _is_index(value)]
            if name not in counts and chosen:
                counts[name] = torch.bincount(chosen[0].flatten(), minlength=module.num_experts)

        return before

    handles = [
        module.register_forward_pre_hook(watch(name, module), with_kwargs=True) for name, module in experts.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _is_index(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)


def _even(layers: Mapping[str, list[int]]) -> bool:
    return len({len(tokens) for tokens in layers.values()}) == 1


def _depends(name: str, each: Metric, *, looped: bool) -> bool:
    """Return whether a metric depends on routing: times always; counts and bytes where Python loops over the experts that are hit."""
    definition = definition_of(name)
    if definition is None or definition.explained is None:
        return False
    return looped or each.noise != "exact"


def _marked(each: Metric) -> Metric:
    return msgspec.structs.replace(each, note=_MARK if each.note is None else f"{_MARK}; {each.note}")
