"""The structure of the code: module names, the half that needs no torch, cheap imports."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hpc_core"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))

MEASURING = {"audit", "builders", "engines", "faults", "instruments", "integrations", "predict", "worker"}

WITHOUT_TORCH = """
import importlib, pkgutil, sys
for name in ("torch", "transformers", "peft", "bitsandbytes"):
    sys.modules[name] = None  # importing it raises
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        importlib.import_module(module.name)
"""
LOADED = """
import sys
import hpc_core
print(sorted({"torch", "numpy", "pytest"} & set(sys.modules)))
"""


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def rooms() -> set[str]:
    """The packages and modules directly below hpc_core."""
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    return names - {"__init__"}


JUDGING = sorted(rooms() - MEASURING)


def python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter, and return what it printed."""
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def contracts() -> list[dict[str, Any]]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        parsed: list[dict[str, Any]] = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    return parsed


def test_modules_are_named_for_what_they_do() -> None:
    """No module has a name that says nothing, such as utils."""
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    assert [relative(path) for path in MODULES if vague & set(Path(relative(path)).with_suffix("").parts)] == []


def test_each_module_is_in_one_half() -> None:
    """Each room is either in the import contract that keeps torch out, or in MEASURING."""
    torch_free = next(contract for contract in contracts() if contract["id"] == "torch-free")["source_modules"]
    assert sorted(torch_free) == [f"hpc_core.{name}" for name in JUDGING]


def test_the_judging_half_works_without_torch() -> None:
    """Every module of the judging half can be imported where torch, transformers, peft and bitsandbytes cannot."""
    python(WITHOUT_TORCH, *(f"hpc_core.{name}" for name in JUDGING))


def test_importing_the_package_loads_nothing_heavy() -> None:
    """`import hpc_core` loads neither torch nor numpy nor pytest."""
    assert python(LOADED).strip() == "[]"


def test_no_public_name_is_a_module_too() -> None:
    """No public name equals a submodule, whose import would replace it in the package's namespace."""
    import hpc_core

    assert not [name for name in hpc_core.__all__ if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()]


def test_each_test_has_a_docstring() -> None:
    """Each test's docstring states the fact that holds if it passes."""
    functions = [
        (path.stem, node)
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert [(stem, node.name) for stem, node in functions if not ast.get_docstring(node)] == []


def test_no_source_file_is_ignored() -> None:
    """No pattern in .gitignore matches a source file, which git would keep out of clones and the build out of the wheel."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git work tree")
    names = "\n".join(path.relative_to(ROOT).as_posix() for path in [*MODULES, *TESTS])
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(command, input=names, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert ignored.stdout.splitlines() == []
