"""What the documents say can be done: their Python is run, their commands and options exist, their links lead somewhere."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hpc_core.cli import main
from hpc_core.cli.commands import app
from hpc_core.cli.known import known_cases

ROOT = Path(__file__).parent.parent
DOCS = sorted(
    [
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "bench/README.md", "baselines/README.md", ".github/CONTRIBUTING.md")),
    ]
)
LIVE = DOCS
_FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(
    r"(?:^(?: {4}|\$ )|`)hpc-core ((?:[a-z-]+)(?: (?:list|show|accept|diff|add-profile))?)([^`\n|]*)", re.MULTILINE
)
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_LINK = re.compile(r"\]\(([^)#\s]+)")
_SUITE_OPTION = re.compile(r"--perf-[a-z-]+")
each_document = pytest.mark.parametrize("path", LIVE, ids=lambda path: str(path.relative_to(ROOT)))


def blocks() -> list[tuple[str, str]]:
    """The Python of all documents, each with where it is from."""
    return [
        (f"{path.relative_to(ROOT)}:{number}", text)
        for path in LIVE
        for number, text in enumerate(_FENCE.findall(path.read_text()), 1)
    ]


@cache
def help_of(command: str) -> str:
    """What a command says of itself; empty if there is none of this name."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()):
        try:
            main([*command.split(), "--help"])
        except SystemExit as end:
            return told.getvalue() if end.code in (0, None) else ""
    return told.getvalue()


@pytest.mark.parametrize(("where", "text"), blocks(), ids=[where for where, _ in blocks()])
def test_python_in_documents_runs(where: str, text: str, tmp_path: Path) -> None:
    """A case file is read as `--cases` reads it; of the rest, which needs modules of a user's own, what is imported of ours exists."""
    if re.search(r"^CASES = ", text, re.MULTILINE):
        path = tmp_path / "documented.py"
        path.write_text(text)
        before = set(known_cases(None))
        assert set(known_cases([path])) - before, "it adds no case"
        return
    taken = [each for each in ast.walk(ast.parse(text, where)) if isinstance(each, ast.ImportFrom)]
    for each in taken:
        if each.module is not None and each.module.partition(".")[0] == "hpc_core":
            found = importlib.util.find_spec(each.module)
            assert found is not None
            assert found.origin is not None
            source = Path(found.origin).read_text()
            assert [name.name for name in each.names if f'"{name.name}"' not in source] == [], where


@each_document
def test_commands_in_documents_exist(path: Path) -> None:
    """Each `hpc-core …` is a command, and each option beside it is one of its options."""
    wrong = []
    for command, rest in _COMMAND.findall(path.read_text()):
        name = command if help_of(command) else command.split()[0]
        told = help_of(name)
        arguments = rest.partition("#")[0].partition(" | ")[0].partition("&&")[0]
        wrong += [f"hpc-core {command} {option}" for option in _OPTION.findall(arguments) if option not in told]
        wrong += [] if told else [f"hpc-core {command}"]
    assert wrong == []


@each_document
def test_options_of_the_suite_in_documents_exist(path: Path) -> None:
    """Each `--perf-…` is an option of the plugin, or the prefix of some."""
    known = (ROOT / "hpc_core" / "plugin" / "options.py").read_text()
    assert [option for option in _SUITE_OPTION.findall(path.read_text()) if option not in known] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(path: Path) -> None:
    """A relative link names a file or folder of this repository."""
    links = [link for link in _LINK.findall(path.read_text()) if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in links if not (path.parent / link).exists()] == []


def _named(command: Any) -> str:
    """A command's name, by default its function's."""
    return str(command.name or command.callback.__name__)


def test_every_command_is_in_the_table_of_exit_codes() -> None:
    """docs/command-line.md has a row for each, and all but those that write JSON files take --json."""
    table = (ROOT / "docs" / "command-line.md").read_text()
    commands = {_named(each) for each in app.registered_commands}
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    commands |= {
        f"{name} {_named(each)}" for name, group in groups.items() if group for each in group.registered_commands
    }
    assert len(commands) > 15
    assert [name for name in sorted(commands) if f"`{name}`" not in table] == []
    silent = [name for name in sorted(commands) if "--json" not in help_of(name)]
    assert silent == []


def test_every_document_is_in_the_index() -> None:
    """docs/README.md leads to each page of docs/."""
    index = (ROOT / "docs" / "README.md").read_text()
    assert [
        path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md" and f"({path.name})" not in index
    ] == []
