"""Hostile texts and numbers for records, and checks of what a report of them must not contain."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from hypothesis import strategies as st

import hpc_core.report.page
from hpc_core.report.entry import entries_of
from hpc_core.report.page import page
from tests.report.many_records import measured

ATTACKS = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% for x in y %}",
    "[click](https://evil.example) ![x](https://evil.example/x.png)",
    "@everyone please look",
    "</details><h1>big</h1>",
    "| a | b |\n|---|---|",
    "=HYPERLINK(1)",
    "+1+cmd|' /C calc'!A0",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egpj.exe",
    "../../../etc/passwd",
    "$\\frac{1}{0}$",
    "\ud800",
    "A" * 5000,
)
LINKS = ("href", "src", "xlink:href", "action", "formaction", "srcset", "data", "poster", "style", "background")

texts = st.sampled_from(ATTACKS) | st.text(max_size=30)
numbers = (
    st.sampled_from([0, -1, 1e308, -1e308, 5e-324, 2**63, -(2**63), 1e15, float("nan"), float("inf")])
    | st.floats()
    | st.integers(-(2**70), 2**70)
)

STYLE = Path(hpc_core.report.page.__file__).with_name("page.css").read_text()


class ParsedPage(HTMLParser):
    """The page as a browser parses it: tags, links, handlers, scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.scripts: list[str] = []
        self.bad: list[str] = []
        self.tags: set[str] = set()
        self.specs = ""
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag, and any attribute that loads, links elsewhere or runs."""
        self.tags.add(tag)
        self._within = "specs" if ("type", "application/json") in attrs else tag
        for name, value in attrs:
            if name.startswith("on") or (name in LINKS and not (value or "").startswith("#")):
                self.bad.append(f"<{tag} {name}={value!r}>")

    def handle_endtag(self, tag: str) -> None:
        """Leave the script."""
        self._within = ""

    def handle_data(self, data: str) -> None:
        """Keep the scripts, and the data of charts, which do not run."""
        if self._within == "script":
            self.scripts.append(data)
        if self._within == "specs":
            self.specs += data


def parse(text: str) -> ParsedPage:
    """Parse a page without its own style sheet."""
    parser = ParsedPage()
    parser.feed(text.replace(STYLE, ""))
    parser.close()
    return parser


def check_page(text: str) -> None:
    """Check that the page has only its own tags, links, handlers and scripts, and that its charts hold names only as data."""
    parsed = parse(text)
    assert parsed.bad == [], parsed.bad
    assert parsed.tags <= OWN_TAGS
    assert set(parsed.scripts) <= set(KNOWN.scripts)
    for spec in json.loads(parsed.specs or "[]"):
        _check_spec(spec)


def _check_spec(node: object) -> None:
    """Check that a chart loads nothing, links to this page alone, and evaluates no text of a record."""
    if isinstance(node, list):
        for each in node:
            _check_spec(each)
    if isinstance(node, dict):
        assert not {"url", "expr", "signal", "test"} & node.keys()
        assert str(node.get("href", "#")).startswith("#") or "field" in node["href"]
        for each in node.values():
            _check_spec(each)


KNOWN = parse(page(entries_of(measured())))
TEMPLATE = Path(hpc_core.report.page.__file__).with_name("page.html.jinja").read_text()
OWN_TAGS = set(re.findall(r"<([a-z0-9]+)", TEMPLATE))


def check_error(text: str) -> None:
    """Check that an error is short and holds no escape sequence."""
    assert len(text) < 1000
    assert "\x1b" not in text


def check_markdown(text: str) -> None:
    """Check that Markdown has only the report's own tags, and no mention or link."""
    tags = [piece.partition(">")[0] for piece in text.split("<")[1:]]
    assert set(tags) <= {"details", "details open", "summary", "/summary", "/details", "sub", "/sub"}
    assert "@" not in text
    assert "](" not in text.replace("\\](", "").replace("]\\(", "")
    assert "://" not in text
