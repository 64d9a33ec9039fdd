"""How much worse a metric may get, as the owner of a case states it. The gate applies these limits."""

from __future__ import annotations

import difflib
import re
import sys
from typing import Any

import msgspec

from hpc_core.case.errors import SpecError

MiB = 2**20
GiB = 2**30

Limit = str | int | float | None
_MAY_BE_0 = (
    *("recompilations", "graph_breaks", "waits", "kept_objects", "copies", "memsets"),
    *("launches", "synchronizations", "device_allocations", "device_frees"),
)
"""Counts of what need not happen at all."""
_PERCENT = re.compile(r"(?P<number>[0-9]{1,6}(\.[0-9]{1,12})?) ?%")


def relative_limit(limit: Limit) -> float | None:
    """Return the ratio that a percentage such as "1.5%" allows (0.015); None for an absolute number.

    Raises:
        SpecError: a text that is not a percentage.
    """
    if not isinstance(limit, str):
        return None
    match = _PERCENT.fullmatch(limit)
    if match is None:
        msg = f'A relative limit is a percentage such as "1%" or "0.05 %", got {limit!r}. For an absolute limit give a number.'
        raise SpecError(msg)
    return float(match["number"]) / 100


def _unit(name: str) -> str:
    """Return the unit of a metric's numbers, as its name ends."""
    units = {"s": " in seconds", "j": " in joules", "bytes": " in bytes"}
    return units.get(name.rpartition("_")[2], "")


class _NamesLimits(msgspec.StructMeta):
    """Answers a name that is no limit with those that are; msgspec's own message lists none."""

    def __call__(self, *args: Any, **limits: Any) -> Any:
        """Make the limits.

        Raises:
            SpecError: a name that is no limit.
        """
        names = getattr(self, "__struct_fields__", ())
        unknown = [name for name in limits if name not in names]
        if unknown:
            near = [each for name in unknown for each in difflib.get_close_matches(name, names, 1, cutoff=0.8)]
            meant = f" Did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
            raise SpecError(f"Limits has no {', '.join(unknown)}.{meant} There are: {', '.join(names)}.")
        return super().__call__(*args, **limits)


class Limits(
    msgspec.Struct, metaclass=_NamesLimits, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Limits of one case, by metric: `"1%"` against the baseline, or an absolute number in the metric's unit.

    A metric without a limit keeps the gate's default. An absolute limit is checked in addition to the default.
    """

    peak_bytes: Limit = None
    peak_load_bytes: Limit = None
    peak_prefill_bytes: Limit = None
    peak_decode_bytes: Limit = None
    peak_forward_bytes: Limit = None
    peak_backward_bytes: Limit = None
    peak_optimizer_bytes: Limit = None
    peak_evaluation_bytes: Limit = None
    peak_save_bytes: Limit = None
    weights_bytes: Limit = None
    adapter_weights_bytes: Limit = None
    optimizer_bytes: Limit = None
    at_peak_weights_bytes: Limit = None
    at_peak_adapter_bytes: Limit = None
    at_peak_gradients_bytes: Limit = None
    at_peak_optimizer_bytes: Limit = None
    at_peak_kv_cache_bytes: Limit = None
    at_peak_activations_bytes: Limit = None
    at_peak_temporaries_bytes: Limit = None
    at_peak_other_bytes: Limit = None
    step_s: Limit = None
    query_s: Limit = None
    time_to_first_token_s: Limit = None
    decode_token_s: Limit = None
    busy_s: Limit = None
    busy_prefill_s: Limit = None
    busy_decode_token_s: Limit = None
    energy_step_j: Limit = None
    energy_token_j: Limit = None
    kernels: Limit = None
    kernels_prefill: Limit = None
    copies: Limit = None
    memsets: Limit = None
    launches: Limit = None
    synchronizations: Limit = None
    device_allocations: Limit = None
    device_frees: Limit = None
    graph_breaks: Limit = None
    recompilations: Limit = None
    operators: Limit = None
    operators_decode: Limit = None
    flops: Limit = None
    flops_prefill: Limit = None
    bytecodes: Limit = None
    bytecodes_decode: Limit = None
    python_calls: Limit = None
    python_calls_decode: Limit = None
    c_calls: Limit = None
    c_calls_decode: Limit = None
    kept_objects: Limit = None
    waits: Limit = None
    trainable_parameters: Limit = None

    def __post_init__(self) -> None:
        """Check the limits.

        Raises:
            SpecError: a malformed percentage, or a number that is not above 0, or not finite.
        """
        for name, limit in self.named().items():
            if isinstance(limit, str):
                is_right = _PERCENT.fullmatch(limit) is not None
            else:
                is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
                is_right = is_number and (0 < (limit or 0) <= sys.float_info.max or (limit == 0 and name in _MAY_BE_0))
            if not is_right:
                raise SpecError(
                    f'Limits({name}={limit!r}): a limit is a percentage such as "5%" or a finite number above 0{_unit(name)}.'
                )

    def named(self) -> dict[str, Limit]:
        """Return the limits that were set, by metric."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if getattr(self, name) is not None}
