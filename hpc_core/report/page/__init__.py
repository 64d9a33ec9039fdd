"""One self-contained HTML page: table, pictures, details. It asks no network, runs no foreign script, and believes no record.

Every value passes jinja2's autoescape; the page's own style and script are named by their hash in a content security policy, so that
nothing else runs even if a value slipped through. Judges nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import hpc_core
from hpc_core.report.entry import Entry
from hpc_core.report.page.cases import columns_of, details_of, moved_of, rows_of
from hpc_core.report.page.machines import machines_of

__all__ = ["LARGEST_BYTES", "page"]

LARGEST_BYTES = 2_000_000
"""Of the whole page."""
_DETAILS_BYTES = (1_000_000, 400_000, 0)
"""What details may take, tried one after the other until the page is small enough."""
MOST_ROWS = 1000
_HERE = Path(__file__).parent


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def page(entries: Sequence[Entry], notes: Sequence[str] = ()) -> str:
    """The page as text, below `LARGEST_BYTES`: details, then rows are left out where it would be larger, and it says so."""
    shown = entries[:MOST_ROWS]
    style, script = _asset("page.css"), _asset("page.js")
    moved = moved_of(shown)
    rows = rows_of(shown)
    is_judged = any(each.judgement is not None for each in entries)
    content: dict[str, Any] = {
        "version": hpc_core.__version__,
        "style": style,
        "script": script,
        "policy": _policy(style, script),
        "rows": rows,
        "columns": columns_of(rows),
        # So many of them have room on a phone, beside case, verdict and change.
        "narrow": 1 if is_judged else 2,
        "is_judged": is_judged,
        "moved": moved[:40],
        "more_moved": max(0, len(moved) - 40),
        "machines": machines_of(shown),
        "left_out": len(entries) - len(shown),
        "notes": notes[:20],
    }
    template = _environment().get_template("page.html.jinja")
    text = ""
    for budget in _DETAILS_BYTES:
        text = template.render(content, details=details_of(shown, budget))
        if len(text.encode()) <= LARGEST_BYTES:
            break
    return text


def _asset(name: str) -> Markup:
    """A file of this folder, which is ours and so need not be escaped."""
    return Markup((_HERE / name).read_text(encoding="utf-8"))  # noqa: S704


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded, sent or run but these two texts."""
    return f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
