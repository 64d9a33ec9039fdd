"""What every test here may use: pytest's own `pytester`, for stories in which a project of somebody else runs."""

from __future__ import annotations

pytest_plugins = ["pytester"]
