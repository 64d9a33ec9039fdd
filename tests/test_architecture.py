"""The shape of the code: telling names, two halves, imports that cost nothing."""

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
    sys.modules[name] = None  # any import of it raises
module = importlib.import_module(sys.argv[1])
for found in pkgutil.walk_packages(getattr(module, "__path__", []), sys.argv[1] + "."):
    importlib.import_module(found.name)
"""
LOADED = """
import sys
import hpc_core
print(sorted({"torch", "numpy", "pytest"} & set(sys.modules)))
"""


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def top_level() -> set[str]:
    """The modules right below hpc_core; a folder counts once it holds code."""
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    return names - {"__init__"}


JUDGING = sorted(top_level() - MEASURING)


def python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter, and return what it printed."""
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def contracts() -> list[dict[str, Any]]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: list[dict[str, Any]] = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    return found


def test_modules_are_named_for_what_they_do() -> None:
    """No module is a drawer for what has no place."""
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    assert [relative(path) for path in MODULES if drawers & set(Path(relative(path)).with_suffix("").parts)] == []


def test_each_module_is_in_one_half() -> None:
    """A new module is either in the import contract that keeps torch out, or in the measuring half, named here."""
    kept_out = next(contract for contract in contracts() if contract["id"] == "torch-free")["source_modules"]
    assert sorted(kept_out) == [f"hpc_core.{name}" for name in JUDGING]


@pytest.mark.parametrize("name", JUDGING)
def test_the_judging_half_works_without_torch(name: str) -> None:
    """Where torch, transformers, peft and bitsandbytes cannot be imported, judging can: every module of it loads."""
    python(WITHOUT_TORCH, f"hpc_core.{name}")


def test_importing_the_package_loads_nothing_heavy() -> None:
    """`import hpc_core` costs a test session nothing: it loads neither torch nor numpy nor pytest."""
    assert python(LOADED).strip() == "[]"


def test_no_public_name_is_a_module_too() -> None:
    """Importing a submodule puts it into the package's namespace, in place of a function of the same name."""
    import hpc_core

    assert not [name for name in hpc_core.__all__ if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_each_test_says_what_it_promises(path: Path) -> None:
    """A test's docstring is the promise it keeps."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    tests = [node for node in functions if node.name.startswith("test_")]
    assert [node.name for node in tests if not ast.get_docstring(node)] == []


def test_no_source_file_is_ignored() -> None:
    """No pattern in .gitignore matches our code: git would keep it out of clones, the build out of the wheel."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git work tree")
    names = "\n".join(path.relative_to(ROOT).as_posix() for path in [*MODULES, *TESTS])
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    found = subprocess.run(command, input=names, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert found.stdout.splitlines() == []
