"""The workflows keep their promises: pinned actions, least permission, no stranger's code on the GPU runner."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

GITHUB = Path(__file__).parent.parent / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
USES = re.compile(r"uses:\s*(?P<action>[\w./-]+)@(?P<commit>[0-9a-f]{40}) # v\d+\.\d+\.\d+\s*$")
SCHEMAS = {
    "github-workflows": WORKFLOWS,
    "dependabot": [GITHUB / "dependabot.yml"],
    "github-issue-forms": [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"],
    "github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
}

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def workflow(path: Path) -> dict[Any, Any]:
    loaded = yaml.safe_load(path.read_text())
    assert isinstance(loaded, dict)
    return loaded


def triggers(path: Path) -> set[str]:
    on = workflow(path)[True]  # YAML 1.1 reads the key "on" as true
    return {on} if isinstance(on, str) else set(on)


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in workflow(path)["jobs"].values():
        yield from job["steps"]


def test_there_are_workflows() -> None:
    """The other tests here look at something."""
    assert {path.stem for path in WORKFLOWS} == {"bench", "ci", "nightly"}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_match_their_published_schema(schema: str) -> None:
    """GitHub would take each file: it is valid by the JSON schema that check-jsonschema carries with it."""
    files = [str(path) for path in SCHEMAS[schema]]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@each_workflow
def test_actions_are_pinned_by_commit(path: Path) -> None:
    """A moved tag cannot change what runs: every action names a full commit, and its version in a comment."""
    lines = [line for line in path.read_text().splitlines() if re.search(r"\buses:", line)]
    assert lines
    assert [line for line in lines if not USES.search(line)] == []


def test_an_action_has_one_version() -> None:
    """All workflows use the same commit of an action."""
    found: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for match in filter(None, map(USES.search, path.read_text().splitlines())):
            found.setdefault(match["action"], set()).add(match["commit"])
    assert {action: commits for action, commits in found.items() if len(commits) > 1} == {}


@each_workflow
def test_permissions_are_least(path: Path) -> None:
    """A workflow has no permission; a job states its own, and none of them writes."""
    loaded = workflow(path)
    assert loaded["permissions"] == {}
    for name, job in loaded["jobs"].items():
        assert job.get("permissions") in ({}, {"contents": "read"}), name


@each_workflow
def test_the_token_is_not_left_on_disk(path: Path) -> None:
    """No checkout keeps its credentials where later steps could read them."""
    checkouts = [step for step in steps(path) if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@each_workflow
def test_scripts_take_no_expressions(path: Path) -> None:
    """What a stranger can name (a branch, a title) reaches a script as an environment variable, never as its text."""
    assert [step["run"] for step in steps(path) if "${{" in step.get("run", "")] == []


@each_workflow
def test_every_job_ends(path: Path) -> None:
    """Each job has a time limit of its own."""
    assert [name for name, job in workflow(path)["jobs"].items() if "timeout-minutes" not in job] == []


@each_workflow
def test_strangers_never_reach_our_hardware(path: Path) -> None:
    """Self-hosted runners serve no pull request, by trigger and by guard."""
    jobs = workflow(path)["jobs"].values()
    ours = [job for job in jobs if "self-hosted" in job["runs-on"]]
    if not ours:
        return
    assert triggers(path) <= {"workflow_dispatch", "schedule"}
    for job in ours:
        assert "github.event_name != 'pull_request'" in job["if"]
        assert "!github.event.repository.fork" in job["if"]


def test_one_check_stands_for_all() -> None:
    """Branch protection names only `required`, so it needs every other job and runs even if one was skipped."""
    jobs = workflow(GITHUB / "workflows" / "ci.yml")["jobs"]
    required = jobs.pop("required")
    assert set(required["needs"]) == set(jobs)
    assert required["if"] == "always()"


def test_no_job_runs_on_a_pull_request_with_secrets() -> None:
    """`pull_request_target` would run a stranger's code with our token; no workflow uses it."""
    assert [path.stem for path in WORKFLOWS if "pull_request_target" in triggers(path)] == []
