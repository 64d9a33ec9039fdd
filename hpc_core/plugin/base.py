"""What a pull request is judged by: baselines, waivers and settings of pytest, all as they were at its merge base."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import iniconfig
import msgspec
import pytest

from hpc_core.baselines.at_commit import PastBaselines
from hpc_core.baselines.pull_request import Loosening
from hpc_core.case.errors import RepositoryError, SpecError
from hpc_core.gate.waivers import Waiver, waivers_from_toml
from hpc_core.record.git import contents, merge_base, top

WAIVERS = "perf-waivers.toml"
"""The default name of the file of waivers, below the root folder."""
BASELINES = "baselines"
"""The default name of the folder of baselines, below the root folder."""
_FILES = ("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg")
"""Where pytest reads its settings, in its order."""
_FOLDER = "--perf-baselines"
_CHOOSE = {
    "addopts": "", "norecursedirs": "", "perf_processes": "auto",
    "perf_paths": "bench", "perf_cases": "", "python_files": "test_*.py *_test.py", "python_classes": "Test",
    "python_functions": "test",
}  # fmt: skip
"""Settings that choose what runs and how often, with pytest's or our default; to lose an entry is to run less."""
_ANY_CHANGE = ("addopts", "norecursedirs", "perf_processes")
"""Of these every change may be less."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Where this run reads its rules, as far as the files of the repository say so."""

    root: Path
    """pytest's root folder."""
    file: Path | None
    """The file of settings that the command line names."""
    here: Path
    """Where the command line was given; its paths are relative to this."""
    baselines: Path
    named: bool
    """Whether the command line names the folder of baselines; else the settings do."""
    settings: Mapping[str, Any]
    """pytest's settings as its file has them."""


class MergeBase:
    """The merge base of HEAD and a revision."""

    def __init__(self, revision: str, rules: Rules) -> None:
        """Read baselines, waivers and settings.

        Raises:
            pytest.UsageError: git knows no such merge base.
        """
        self.revision = revision
        self._rules = rules
        try:
            self.commit = merge_base(_existing(rules.root), revision)
            self._roots, self._settings = _settings_at(rules, self.commit)
            # Without settings pytest's root was one of these: the nearest that has baselines.
            found = [PastBaselines(folder, self.commit) for folder in self._folders()]
            self.baselines = next((each for each in found if each.known()), found[0])
            self.waivers = next(filter(None, map(self._waivers, self._roots)), ())
        except RepositoryError as error:
            raise pytest.UsageError(f"--perf-base {revision}: {error}") from error

    def _folders(self) -> list[Path]:
        if self._rules.named:
            return [self._rules.baselines]
        options = " ".join(_words(self._settings.get("addopts"))).replace(f"{_FOLDER}=", f"{_FOLDER} ").split()
        if _FOLDER in options[:-1]:
            return [self._rules.here / options[options.index(_FOLDER) + 1]]
        return [root / str(self._settings.get("perf_baselines", BASELINES)) for root in self._roots]

    def _waivers(self, root: Path) -> tuple[Waiver, ...]:
        name = str(self._settings.get("perf_waivers", WAIVERS))
        raw = contents(_existing(root), [(self.commit, root / name)])[0]
        try:
            return () if raw is None else waivers_from_toml(raw.decode(), name)
        except (SpecError, UnicodeDecodeError):
            return ()  # a file that nobody could read then excused nothing

    def changed(self, file: Path) -> str:
        """Return the file, or a conftest.py that acts on it, if it is not what it was at the merge base; else an empty text."""
        root = self._rules.root.resolve()
        folders = [folder for folder in file.resolve().parents if folder == root or root in folder.parents]
        paths = [file, *(folder / "conftest.py" for folder in folders)]
        try:
            before = contents(root, [(self.commit, path) for path in paths])
        except RepositoryError:  # it lies elsewhere, so nobody can tell
            return str(file)
        for path, raw in zip(paths, before, strict=True):
            if raw != (path.read_bytes() if path.is_file() else None):
                return str(path.relative_to(root) if path.is_relative_to(root) else path)
        return ""

    def settings_changed(self) -> tuple[Loosening, ...]:
        """Return the settings that the pull request changes so that it may be judged by less."""
        old, new = self._settings, self._rules.settings
        found = []
        if self._rules.root.resolve() not in self._roots:
            found.append(_changed("rootdir", str(self._roots[0]), str(self._rules.root)))
        found += [
            _changed(name, str(old.get(name, default)), str(new.get(name, default)))
            for name, default in (("perf_baselines", BASELINES), ("perf_waivers", WAIVERS))
            if str(old.get(name, default)) != str(new.get(name, default))
        ]
        for name, default in _CHOOSE.items():
            was, is_now = _words(old.get(name, default)), _words(new.get(name, default))
            changed = was != is_now if name in _ANY_CHANGE else bool(set(was) - set(is_now))
            if changed:
                found.append(_changed(name, shlex.join(was) or "none", shlex.join(is_now) or "none"))
        return tuple(found)


def _changed(name: str, old: str, new: str) -> Loosening:
    return Loosening(what=f"setting {name}", old=old, new=new)


def _words(value: Any) -> list[str]:
    if value is None:
        return []
    return shlex.split(value) if isinstance(value, str) else [str(each) for each in value]


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _settings_at(rules: Rules, commit: str) -> tuple[list[Path], dict[str, Any]]:
    """Return the root folder and pytest's settings at a commit; without settings, the folders that could have been its root.

    A file of settings that is new moves the root to its own folder, so the folders above are asked, too.
    """
    if rules.file is not None:
        raw = contents(_existing(rules.root), [(commit, rules.file)])[0]
        return [rules.root.resolve()], {} if raw is None else (pytest_settings(rules.file, raw) or {})
    folders = list(_up_to(rules.root.resolve(), top(_existing(rules.root)).resolve()))
    places = [folder / name for folder in folders for name in _FILES]
    for path, raw in zip(places, contents(folders[-1], [(commit, path) for path in places]), strict=True):
        found = None if raw is None else pytest_settings(path, raw)
        if found is not None:
            return [path.parent], found
    return folders, {}


def _up_to(folder: Path, root: Path) -> Iterator[Path]:
    yield folder
    while folder != root and root in folder.parents:
        folder = folder.parent
        yield folder


def settings_above(folder: Path) -> Path | None:
    """Return the settings file that pytest finds if given only this path; None if there is none."""
    places = (place / name for place in (folder, *folder.parents) for name in _FILES)
    return next(
        (path for path in places if path.is_file() and pytest_settings(path, path.read_bytes()) is not None), None
    )


def pytest_settings(path: Path, raw: bytes) -> dict[str, Any] | None:
    """Return pytest's settings in the content of a file, as it has them; None if it is no file of settings for pytest."""
    try:
        text = raw.decode()
        if path.suffix == ".toml":
            content = tomllib.loads(text)
            if path.name == "pyproject.toml":
                tool = content.get("tool", {}).get("pytest")
                return None if tool is None else dict(tool.get("ini_options", tool))
            return dict(content.get("pytest", {}))
        sections = iniconfig.IniConfig(str(path), data=text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, iniconfig.ParseError):
        return None
    name = "tool:pytest" if path.name == "setup.cfg" else "pytest"
    if name in sections:
        return dict(sections[name].items())
    return {} if path.name in ("pytest.ini", ".pytest.ini") else None
