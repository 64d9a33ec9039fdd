"""What people read: the terminal's table, the two files of the original report. Judges and launches nothing."""

from __future__ import annotations

from hpc_core.report.row import Row
from hpc_core.report.terminal import caption, render, summary

__all__ = ["Row", "caption", "render", "summary"]
