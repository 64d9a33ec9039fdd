"""Checks of arguments that every script of this folder makes before it measures for minutes."""

from __future__ import annotations

from pathlib import Path

from hpc_core.record.environment import visible_gpus

__all__ = ["what_is_missing"]


def what_is_missing(device: str, out: str) -> str:
    """Return a sentence if `device` is a GPU and none is visible, or if the folder of `out` does not exist; else ""."""
    if device.startswith("cuda") and not visible_gpus():
        return "no GPU is visible: use --device cpu with --shape tiny"
    if out and not Path(out).absolute().parent.is_dir():
        return f"--out {out}: there is no such folder"
    return ""
