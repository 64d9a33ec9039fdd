"""Write the pages of the reference that follow from the code: commands, pytest options, metrics and the fields of a case.

`mkdocs.yml` runs this as a hook, so the site is always current and no generated text is committed.
`python docs/generated.py NAME` prints one page.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import typer.core
import typer.main

Parts = dict[str, tuple[str, ...]]
CASE_FIELDS: Parts = {
    "hpc_core.case.case": ("Case",),
    "hpc_core.case.parts": ("ModelSpec", "QuantSpec", "AdapterSpec", "DataSpec"),
    "hpc_core.case.workloads": ("GenerateSpec", "FinetuneSpec", "FeedSpec", "CallableSpec"),
    "hpc_core.case.limits": ("Limits",),
}
"""The modules and classes that a case is made of."""


VARIABLES = {
    "HPC_CORE_CACHE": "folder of tokenized data",
    "HPC_CORE_COMMIT": "the hash of the commit of a tree that was copied without its history; it wins over git",
    "HPC_CORE_DATA": "folder with `gsm8k/test.jsonl` and `wikitext2/wiki.test.raw`, in place of the hub",
    "GITHUB_STEP_SUMMARY": "file to which the report's Markdown is added",
    "CXX": "C++ compiler that predictions need once",
}


def commands() -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """Yield each command's whole name, such as "baseline accept", and its definition."""
    from hpc_core.cli.commands import app

    root: Any = typer.main.get_command(app)
    for name, command in sorted(root.commands.items()):
        subcommands = getattr(command, "commands", None)
        if subcommands is None:
            yield name, command
        else:
            yield from ((f"{name} {each}", subcommands[each]) for each in sorted(subcommands))


def command_line() -> str:
    """Return the page of commands, from the typer app."""
    lines = [
        "# Command line",
        "",
        "Results go to standard output, progress to standard error. A usage error is one line on standard error and exit "
        "code 2, never a traceback. [Verdicts and exit codes](verdicts.md) lists the other codes.",
        "The suite itself is `pytest --benchmark`: see [pytest options](pytest-options.md).",
    ]
    for name, command in commands():
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        options = [each for each in command.params if each.param_type_name == "option"]
        usage = " ".join([f"hpc-core {name}", *(_metavar(each) for each in arguments), "[OPTIONS]" if options else ""])
        lines += ["", f"## {name}", "", f"    {usage.strip()}", "", _inline(command.help or "")]
        rows = [(_metavar(each), _help(each, _choices(command, each.name))) for each in arguments]
        rows += [
            (", ".join([*each.opts, *each.secondary_opts]), _help(each, _choices(command, each.name)))
            for each in options
        ]
        if rows:
            lines += ["", "| argument or option | meaning |", "|---|---|"]
            lines += [f"| `{left}` | {_cell(right)} |" for left, right in rows]
    return "\n".join(lines) + "\n"


def _choices(command: Any, parameter: str) -> tuple[str, ...]:
    """Return the values that a parameter's `Literal` names; empty for any other type."""
    hints = typing.get_type_hints(command.callback).get(parameter)
    literals = [each for each in (hints, *typing.get_args(hints)) if typing.get_origin(each) is typing.Literal]
    return tuple(str(value) for each in literals for value in typing.get_args(each))


def _metavar(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name).strip("[]{}").upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _help(parameter: Any, choices: tuple[str, ...]) -> str:
    text = _inline(parameter.help or "")
    if choices:
        text += " One of " + ", ".join(f"`{each}`" for each in choices) + "."
    shown = parameter.default
    if not callable(shown) and shown not in (None, False, "", [], ()) and parameter.param_type_name == "option":
        text += f" Default: `{shown}`."
    return text.strip()


class _Recorder:
    """Takes the place of pytest's parser and keeps what the plugin adds to it."""

    def __init__(self) -> None:
        self.options: list[tuple[tuple[str, ...], dict[str, Any]]] = []
        self.ini: list[tuple[str, str, Any]] = []

    def getgroup(self, *_: object) -> _Recorder:
        return self

    def addoption(self, *names: str, **attributes: Any) -> None:
        self.options.append((names, attributes))

    def addini(self, name: str, help: str, type: object = None, default: Any = None) -> None:  # noqa: A002 - pytest's names
        self.ini.append((name, help, default))


def pytest_options() -> str:
    """Return the page of pytest options and ini settings, from the plugin."""
    from hpc_core.plugin.options import add_options

    parser = _Recorder()
    add_options(parser)  # type: ignore[arg-type]  # as much of a parser as the plugin uses
    lines = [
        "# pytest options",
        "",
        "Nothing of the plugin runs without `--benchmark`. Write an option that takes a path with `=` "
        "(`--perf-records=DIR`): pytest looks for its root folder before it knows these options. "
        "`--benchmark-json`, `--benchmark-save` and `--benchmark-compare` are pytest-benchmark's and see the wall samples.",
        "",
        "## Options",
        "",
        "| option | meaning |",
        "|---|---|",
    ]
    for names, attributes in parser.options:
        value = attributes.get("metavar") or "|".join(attributes.get("choices") or ())
        shown = ", ".join(reversed(names)) + (f" {value}" if value else "")
        lines.append(f"| `{shown}` | {_cell(_inline(str(attributes.get('help', ''))))} |")
    lines += ["", "## Settings in the ini file", "", "| setting | meaning | default |", "|---|---|---|"]
    for name, text, default in parser.ini:
        shown = " ".join(default) if isinstance(default, list) else default
        lines.append(f"| `{name}` | {_cell(_inline(text))} | {f'`{shown}`' if shown else ''} |")
    lines += ["", "## Environment variables", "", "| variable | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in VARIABLES.items()]
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """Return the page of metrics, from their registry."""
    from hpc_core.record import metrics as registry

    lines = [
        "# Metrics",
        "",
        "`exact` metrics are bytes, counts and FLOPs; `busy` ones are time in which the GPU works; `wall` ones are read "
        "from a host's clock. The tolerance is the share of the accepted value by which a metric may be worse; a case's "
        "`limits` replace it, and bytes of a GPU may always differ by 2 MiB. A metric without one is shown and stored, not "
        "judged. How each is taken: [Method](../explanation/method.md).",
        "",
        "| metric | meaning | class, unit | better | tolerance |",
        "|---|---|---|---|---|",
    ]
    for each in sorted(_definitions(registry), key=lambda each: each.name):
        tolerance = f"{each.tolerance:.2%}".replace(".00%", "%").replace("%", " %") if each.tolerance else "equal"
        where = ", on a GPU" if each.gated == "gpu" or each.gpu_only else ""
        judged = tolerance + where if each.gated else ""
        cells = (f"`{each.name}`", _inline(each.doc), f"{each.noise}, {each.unit}", each.better, judged)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _definitions(registry: Any) -> list[Any]:
    """Return every definition in the registry's module, whatever collection holds them."""
    found: dict[str, Any] = {}
    for value in vars(registry).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        found |= {each.name: each for each in values if isinstance(each, registry.Definition)}
    return list(found.values())


def case_fields() -> str:
    """Return the page of a case's fields, from the classes and the text below each field."""
    lines = [
        "# Fields of a case",
        "",
        "A case is a frozen value, equal to its JSON. `Case.vary(variant, **changes)` changes a field by its name, whichever "
        "part it is in. A case whose parts contradict each other is refused when it is made. The digest covers everything "
        "that decides what runs; `id`, `timeout_s` and `limits` are not part of it.",
    ]
    for module, classes in CASE_FIELDS.items():
        loaded = importlib.import_module(module)
        trees = {
            node.name: node for node in ast.parse(inspect.getsource(loaded)).body if isinstance(node, ast.ClassDef)
        }
        for name in classes:
            lines += ["", f"## {name}", "", _inline(inspect.getdoc(getattr(loaded, name)) or ""), ""]
            lines += ["| field | type | default | meaning |", "|---|---|---|---|", *_fields(trees[name])]
    return "\n".join(lines) + "\n"


def _fields(tree: ast.ClassDef) -> Iterator[str]:
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or ast.unparse(node.target).startswith("_"):
            continue
        doc = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            doc = _inline(str(after.value.value))
        default = "required" if node.value is None else f"`{ast.unparse(node.value)}`"
        cells = (f"`{ast.unparse(node.target)}`", f"`{ast.unparse(node.annotation)}`", default, doc)
        yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _inline(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    """Return text for a cell of a table: outside of code, pipes and angle brackets are escaped."""
    parts = text.split("`")
    parts[::2] = [part.replace("|", "\\|").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


PAGES: dict[str, Callable[[], str]] = {
    "reference/command-line.md": command_line,
    "reference/pytest-options.md": pytest_options,
    "reference/metrics.md": metrics,
    "reference/case.md": case_fields,
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site (a hook of MkDocs)."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files


if __name__ == "__main__":
    sys.stdout.write(PAGES[f"reference/{sys.argv[1]}.md"]())
