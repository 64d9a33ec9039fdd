"""What holds more memory at the peak than before, by category and by the operator that made it. Judges nothing."""

from __future__ import annotations

from hpc_core.record import units as sizes
from hpc_core.record.record import Record

__all__ = ["grown"]

_WORTH_SAYING_BYTES = 2**20


def grown(before: Record, now: Record, most: int = 5) -> tuple[str, ...]:
    """Lines such as "activations aten.mul.Tensor 1.31 GiB → 3.00 GiB (+1.69 GiB)", the largest first, from two records' makers."""
    old, new = before.makers_at_peak, now.makers_at_peak
    if not old:
        return ()
    changes = {name: value - old.get(name, 0) for name, value in new.items()}
    largest = sorted(changes.items(), key=lambda each: (-each[1], each[0]))[:most]
    return tuple(
        f"{name} {sizes.quantity(old.get(name, 0), 'bytes')} → {sizes.quantity(new[name], 'bytes')} ({sizes.change(change, 'bytes')})"
        for name, change in largest
        if change >= _WORTH_SAYING_BYTES
    )
