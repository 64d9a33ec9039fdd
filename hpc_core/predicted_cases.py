"""The cases that are predicted without a GPU: the full-size catalogue, other shapes, and some that were held out."""

from __future__ import annotations

__all__ = ["HELD_OUT", "PREDICTED"]
