"""The version of hpc-core, and the folder that it runs from."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"
PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
