"""Documents are correct: their Python runs, their commands and options exist, and their links and files exist."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hpc_core.case import errors
from hpc_core.cli.inputs import known_cases

ROOT = Path(__file__).parent.parent
TRACKED = frozenset(
    name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if (ROOT / name).exists()
)
HISTORY = {"CHANGELOG.md", "bench/studies/log.md"}
"""Documents of the past, which may name what no longer exists."""
DOCS = sorted(name for name in TRACKED if name.endswith(".md"))
LIVE = [name for name in DOCS if name not in HISTORY]
SOURCES = sorted(name for name in TRACKED if name.endswith(".py"))

_FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?:^(?: {4}|\$ )|`|&& )hpc-core ([a-z][a-z-]*(?: [a-z][a-z-]*)?)([^`\n|]*)", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_LINK = re.compile(r"\]\(([^)\s]+)\)|^\[\w+\]: (\S+)", re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"(?<![\w/<>.:-])((?:[\w.-]+/)+[\w-]+\.(?:py|md|toml|yml|cpp|json|svg|png|jinja))(?![\w*<])")
_FILE = re.compile(r"(?<![\w/<>.*{-])(\w+\.py)(?![\w*])")
_MODULE = re.compile(r"(?<![\w./-])(hpc_core(?:\.[a-z_]\w*)+)")


def _generator() -> ModuleType:
    """Return the module that writes the generated pages of the reference."""
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "generated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATED = _generator()
COMMANDS = {
    name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in GENERATED.commands()
}
OF_COMMANDS = {"--help", "--version"}
TOP = {name.partition("/")[0] for name in TRACKED if "/" in name} - {".github", ".ci"}
ROOMS = {name.split("/")[1] for name in TRACKED if name.startswith("hpc_core/") and name.count("/") > 1}
BASENAMES = {name.rpartition("/")[2] for name in TRACKED} | {"my_cases.py", "perf_cases.py", "file.py"}
"""Names of files, and of the examples that documents use."""
OUTPUT = ("runs/", "site/", "baselines/")
"""Folders of files that a run writes."""

each_document = pytest.mark.parametrize("name", LIVE)


def blocks() -> list[tuple[str, str]]:
    """Return the Python of all documents, with its place."""
    return [
        (f"{name}:{number}", text)
        for name in LIVE
        for number, text in enumerate(_FENCE.findall((ROOT / name).read_text()), 1)
    ]


@pytest.mark.parametrize(("where", "text"), blocks(), ids=[where for where, _ in blocks()])
def test_python_in_documents_runs(where: str, text: str, tmp_path: Path) -> None:
    """A case file adds a case when read as `--cases` reads it; other code imports only existing names of hpc_core."""
    if re.search(r"^CASES = ", text, re.MULTILINE):
        path = tmp_path / "documented.py"
        path.write_text(text)
        before = set(known_cases(None))
        assert set(known_cases([path])) - before, "it adds no case"
        return
    for node in ast.walk(ast.parse(text, where)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hpc_core":
            missing = [alias.name for alias in node.names if not _module_exists(f"{node.module}.{alias.name}")]
            assert missing == []


@each_document
def test_commands_in_documents_exist(name: str) -> None:
    """Each `hpc-core …` is a command, and each option after it is one of its options."""
    wrong = []
    for words, rest in _COMMAND.findall((ROOT / name).read_text()):
        command = words if words in COMMANDS else words.split()[0]
        if command not in COMMANDS:
            wrong += [] if any(each.startswith(f"{command} ") for each in COMMANDS) else [f"hpc-core {command}"]
            continue
        arguments = rest.partition("#")[0].partition(" | ")[0].partition("&&")[0]
        known = COMMANDS[command] | OF_COMMANDS
        wrong += [f"hpc-core {command} {option}" for option in _OPTION.findall(arguments) if option not in known]
    assert wrong == []


def test_options_of_the_suite_in_documents_exist() -> None:
    """Each `--perf-…` in a document is an option of the plugin."""
    known = set(_OPTION.findall(GENERATED.pytest_options()))
    used = {(name, option) for name in LIVE for option in re.findall(r"--perf-[a-z-]+", (ROOT / name).read_text())}
    assert sorted((name, option) for name, option in used if option not in known) == []


@each_document
def test_links_in_documents_lead_somewhere(name: str) -> None:
    """A relative link names a file, folder or generated page, and its anchor is a heading there."""
    wrong = []
    for groups in _LINK.findall((ROOT / name).read_text()):
        link = next(each for each in groups if each)
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        relative = target.resolve().relative_to(ROOT)
        if str(relative).removeprefix("docs/") in GENERATED.PAGES and str(relative).startswith("docs/"):
            continue
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            wrong.append(link)
    assert wrong == []


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_generated_reference_describes_everything() -> None:
    """Every command, option and metric has a description."""
    pages = {name: page() for name, page in GENERATED.PAGES.items()}
    empty = [
        (name, line)
        for name, text in pages.items()
        if name != "reference/case.md"
        for line in text.splitlines()
        if re.match(r"\| `[^|]*` \|\s*\|", line)
    ]
    assert empty == []
    assert all(f"## {command}\n" in pages["reference/command-line.md"] for command in COMMANDS)


def test_the_tree_of_errors_is_complete() -> None:
    """The docstring of `hpc_core/case/errors.py` lists every error that the module defines."""
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert sorted(name for name in defined if name not in str(errors.__doc__)) == []


def references(name: str) -> Iterator[tuple[int, str]]:
    """Yield the line and text of all prose: the inline code of Markdown, the comments and docstrings of Python."""
    text = (ROOT / name).read_text()
    if name.endswith(".md"):
        prose = re.sub(r"^```.*?^```", lambda fence: "\n" * fence.group().count("\n"), text, flags=re.M | re.S)
        for number, line in enumerate(prose.splitlines(), 1):
            yield from ((number, code) for code in _CODE.findall(line))
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.string.startswith('"""')):
            yield token.start[0], token.string


def missing_files(name: str) -> Iterator[str]:
    """Yield each reference to a missing file or module; references to docs/ are found in messages too."""
    for path in re.findall(r"docs/[\w/-]+\.(?:md|svg|png)", (ROOT / name).read_text()):
        if path not in TRACKED and path.removeprefix("docs/") not in GENERATED.PAGES:
            yield f"{name}: {path}"
    for number, text in references(name):
        for path in _PATH.findall(text):
            first = path.partition("/")[0]
            ours = first in TOP | ROOMS and not path.startswith(OUTPUT)
            places = (path, f"hpc_core/{path}", f"{name.rpartition('/')[0]}/{path}")
            if ours and not any(place in TRACKED for place in places):
                yield f"{name}:{number}: {path}"
        for file in _FILE.findall(text):
            if file not in BASENAMES:
                yield f"{name}:{number}: {file}"
        for module in _MODULE.findall(text):
            if not _module_exists(module):
                yield f"{name}:{number}: {module}"


def _module_exists(dotted: str) -> bool:
    """Return whether a dotted name is a module, or a name that its module defines."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = "/".join(parts[:length])
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            if candidate in TRACKED:
                rest = parts[length:]
                return not rest or re.search(rf"\b{re.escape(rest[0])}\b", (ROOT / candidate).read_text()) is not None
    return False


@pytest.mark.parametrize("folder", ["hpc_core", "bench", "tests", "examples", "documents"])
def test_named_files_exist(folder: str) -> None:
    """A file or module that a document, comment or docstring names exists."""
    names = LIVE if folder == "documents" else [each for each in SOURCES if each.startswith(f"{folder}/")]
    assert [each for name in names for each in missing_files(name)] == []
