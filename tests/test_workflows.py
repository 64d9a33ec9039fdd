"""The workflows pin their actions, have the least permissions, and never run a stranger's code on the GPU runner."""

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
    """The workflows that the other tests check exist."""
    assert {path.stem for path in WORKFLOWS} == {"bench", "ci", "nightly"}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_match_their_published_schema(schema: str) -> None:
    """Each file is valid by GitHub's JSON schema, which check-jsonschema includes."""
    files = [str(path) for path in SCHEMAS[schema]]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@each_workflow
def test_actions_are_pinned_by_commit(path: Path) -> None:
    """Every action names a full commit, with its version in a comment, so a moved tag changes nothing."""
    lines = [line for line in path.read_text().splitlines() if re.search(r"\buses:", line)]
    assert lines
    assert [line for line in lines if not USES.search(line)] == []


def test_an_action_has_one_version() -> None:
    """All workflows use the same commit of an action."""
    commits_of: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for match in filter(None, map(USES.search, path.read_text().splitlines())):
            commits_of.setdefault(match["action"], set()).add(match["commit"])
    assert {action: commits for action, commits in commits_of.items() if len(commits) > 1} == {}


@each_workflow
def test_permissions_are_least(path: Path) -> None:
    """A workflow has no permission; each job states its own, and none may write."""
    loaded = workflow(path)
    assert loaded["permissions"] == {}
    for name, job in loaded["jobs"].items():
        assert job.get("permissions") in ({}, {"contents": "read"}), name


@each_workflow
def test_the_token_is_not_left_on_disk(path: Path) -> None:
    """No checkout leaves its credentials where later steps could read them."""
    checkouts = [step for step in steps(path) if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@each_workflow
def test_scripts_take_no_expressions(path: Path) -> None:
    """Names that a stranger can choose (a branch, a title) reach a script as environment variables only."""
    assert [step["run"] for step in steps(path) if "${{" in step.get("run", "")] == []


@each_workflow
def test_every_job_ends(path: Path) -> None:
    """Each job has a time limit."""
    assert [name for name, job in workflow(path)["jobs"].items() if "timeout-minutes" not in job] == []


@each_workflow
def test_strangers_never_reach_our_hardware(path: Path) -> None:
    """Self-hosted runners serve no pull request, by trigger and by condition."""
    jobs = workflow(path)["jobs"].values()
    self_hosted = [job for job in jobs if "self-hosted" in job["runs-on"]]
    if not self_hosted:
        return
    assert triggers(path) <= {"workflow_dispatch", "schedule"}
    for job in self_hosted:
        assert "github.event_name != 'pull_request'" in job["if"]
        assert "!github.event.repository.fork" in job["if"]


def test_one_check_stands_for_all() -> None:
    """`required`, the only check that branch protection names, needs every other job and always runs."""
    jobs = workflow(GITHUB / "workflows" / "ci.yml")["jobs"]
    required = jobs.pop("required")
    assert set(required["needs"]) == set(jobs)
    assert required["if"] == "always()"


def test_no_job_runs_on_a_pull_request_with_secrets() -> None:
    """No workflow uses `pull_request_target`, which runs a stranger's code with our token."""
    assert [path.stem for path in WORKFLOWS if "pull_request_target" in triggers(path)] == []
