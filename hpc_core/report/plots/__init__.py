"""A report as pictures: the original report's four, speed against memory, roofline, memory by category, ablation.

Draws with matplotlib, which is optional, and imports it only when something is drawn. Judges nothing.
"""

from __future__ import annotations

from hpc_core.report.plots.drawing import PLOTS, Drawing

__all__ = ["PLOTS", "Drawing"]
