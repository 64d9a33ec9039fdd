"""What a reviewer sees of a pull request: edited baselines, waivers, uncommitted code, gains to keep."""

from __future__ import annotations

import datetime
import functools

import pytest

from tests.plugin.scripted_project import Run, lower, scripted_project
from tests.record.git_project import GitProject

pytestmark = pytest.mark.slow

GIB = 2**30
TODAY = datetime.datetime.now(datetime.UTC).date()
CASE = "test_own/test_step"


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest --benchmark in a project whose suite each test writes."""
    return functools.partial(scripted_project(pytester, monkeypatch), "--benchmark")


def bench(pytester: pytest.Pytester, *peaks: int, more: str = "") -> None:
    """Write the suite of the project: one test per peak."""
    names = ["step", "other"]
    tests = (
        f"def test_{name}(perf):\n    perf('scripted:step', peak={peak}{more})\n"
        for name, peak in zip(names, peaks, strict=False)
    )
    (pytester.path / "bench" / "test_own.py").write_text("\n".join(tests))


def waive(pytester: pytest.Pytester, *, limit: str, days: int, case: str = CASE, metric: str = "peak_bytes") -> None:
    """Write the file of waivers with one entry."""
    expires = TODAY + datetime.timedelta(days=days)
    entry = f'case = "{case}"\nmetric = "{metric}"\nlimit = {limit}\nreason = "a known bug"\nowner = "jane"\n'
    (pytester.path / "perf-waivers.toml").write_text(f"[[waiver]]\n{entry}expires = {expires}\n")


def test_a_pull_request_that_edits_its_baseline(pytester: pytest.Pytester, run: Run) -> None:
    """More memory fails against the merge base; accepted in the same pull request it passes and stays REGRESSED.

    The edited baseline is listed with both values and the reason.
    """
    bench(pytester, GIB)
    lower(pytester, run, GIB // 2)
    project = GitProject(pytester.path)
    project.commit("the baseline")
    project.git("checkout", "-q", "-b", "topic")

    before = run("--perf-base", "main")
    assert before.ret == 1
    before.stdout.fnmatch_lines(["*baselines changed since the merge base with main*", "none"])

    assert run("--perf-update", "--reason", "more on purpose", "--perf-base", "main").ret == 0
    project.commit("accepted")
    assert run().ret == 0
    after = run("--perf-base", "main")
    assert after.ret == 0
    after.assert_outcomes(passed=1)
    after.stdout.fnmatch_lines([
        "*test_own/test_step*REGRESSED*",
        "REGRESSED, excused test_own/test_step: peak_bytes +512.00 MiB, limit +0.05 %",
        "*accepted in this pull request: peak_bytes 512.00 MiB → 1.00*",
        "*baselines changed since the merge base with main*",
        "cpu/test_own/test_step: peak_bytes 512.00 MiB → 1.00 GiB (+100 %); reason: more on purpose",
    ])  # fmt: skip


def test_no_merge_base_is_a_usage_error(pytester: pytest.Pytester, run: Run) -> None:
    """Without a repository, or with an unknown revision, nothing runs and one line says why."""
    bench(pytester, GIB)
    assert run("--perf-base", "main").ret == 4
    GitProject(pytester.path).commit("first")
    result = run("--perf-base", "origin/main")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["ERROR: --perf-base origin/main: *has no revision 'origin/main'*"])


def test_a_waiver_until_it_expires(pytester: pytest.Pytester, run: Run) -> None:
    """Within its limit the test passes, with owner, reason and days; a tighter limit does not help.

    An expired waiver fails any run, even if the metric is within its tolerance.
    """
    bench(pytester, GIB, GIB)
    lower(pytester, run, GIB - 2**24)
    assert run("--case", CASE).ret == 1

    waive(pytester, limit='"+5 %"', days=12)
    waived = run("--case", CASE)
    assert waived.ret == 0
    waived.stdout.fnmatch_lines([
        "*peak_bytes: waived up to +5 % by jane until * (12 days left): a*",
        f"peak_bytes of {CASE} up to +5 %, by jane * (12 days left): a known bug [[]used by {CASE}]",
    ])  # fmt: skip
    waive(pytester, limit=str(GIB - 2**23), days=12)
    assert run("--case", CASE).ret == 1

    run("--perf-update", "--reason", "fixed")
    waive(pytester, limit='"+5 %"', days=-2)
    expired = run("--case", CASE)
    assert expired.ret == 1
    expired.assert_outcomes(failed=1)
    expired.stdout.fnmatch_lines(
        [f"waiver of peak_bytes of {CASE} by jane expired on * (2 days ago): remove it or renew it"]
    )
    other = run("--case", "*/test_other")
    assert other.ret == 1
    other.assert_outcomes(passed=1)
    other.stdout.fnmatch_lines(["*EXPIRED 2 days ago*"])


def test_a_waiver_of_nothing_warns(pytester: pytest.Pytester, run: Run) -> None:
    """A waiver that matches no case or metric gives a warning; one that cannot be read is a usage error."""
    bench(pytester, GIB)
    waive(pytester, limit="1", days=1, case="gone/*")
    run().stdout.fnmatch_lines(["*WARNING: matches none of 1 cases of the suite and of the baselines*"])
    waive(pytester, limit="1", days=1, metric="peek_bytes")
    run().stdout.fnmatch_lines([f"*WARNING: {CASE} without such a metric*"])
    (pytester.path / "perf-waivers.toml").write_text("[[waiver]]\nowner = 3\n")
    result = run()
    assert result.ret == 4
    result.stderr.fnmatch_lines(["ERROR: perf-waivers.toml, waiver 1: *"])


def test_a_waiver_of_other_cases_is_not_shown(pytester: pytest.Pytester, run: Run) -> None:
    """A run of one case shows the waivers of that case, and no warning about a waiver of no case."""
    bench(pytester, GIB, GIB)
    waive(pytester, limit="1", days=1)
    assert "test_own/test_step up to" in str(run("--case", CASE).stdout)
    assert "up to" not in str(run("--case", "*/test_other").stdout)
    waive(pytester, limit="1", days=1, case="gone/*")
    assert "matches none" not in str(run("--case", CASE).stdout)
    assert "matches none" in str(run().stdout)


def test_uncommitted_code_needs_perf_allow_dirty(pytester: pytest.Pytester, run: Run) -> None:
    """Numbers of a tree that was changed while the case ran are refused, and nothing is written."""
    bench(pytester, GIB, more=", dirty=True")
    refused = run("--perf-update", "--reason", "try")
    assert refused.ret == 1
    refused.stdout.fnmatch_lines(["*REFUSED*", f"REFUSED {CASE}: the tree has uncommitted changes*"])
    assert not (pytester.path / "baselines").exists()
    assert run("--perf-update", "--reason", "try", "--perf-allow-dirty").ret == 0
    assert run("--perf-allow-dirty").ret == 4


def test_an_update_that_would_be_refused_measures_nothing(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a reason, without a commit, with uncommitted code or a file that it may read: one line, before any case runs."""
    bench(pytester, GIB)
    monkeypatch.delenv("HPC_CORE_COMMIT")

    def refused(*arguments: str) -> str:
        result = run("--perf-update", "--perf-records=seen", *arguments)
        assert result.ret == 4
        assert not (pytester.path / "seen").exists()
        assert not (pytester.path / "baselines").exists()
        (line,) = [line for line in result.errlines if line.startswith("ERROR")]
        return line

    assert "--perf-update needs --reason" in refused()
    project = GitProject(pytester.path)
    assert "in one without a commit" in refused("--reason=r")
    project.write(".gitignore", "__pycache__/\n")
    project.commit("first")
    monkeypatch.setenv("HPC_CORE_COMMIT", "main")
    assert "HPC_CORE_COMMIT='main' is no commit" in refused("--reason=r")
    monkeypatch.delenv("HPC_CORE_COMMIT")
    for name in ("bench/settings.yaml", "config.json", "prompts.txt"):
        project.write(name, "batch: 4\n")
        assert f"uncommitted changes on {project.git('rev-parse', 'HEAD')[:10]}" in (line := refused("--reason=r"))
        assert line.endswith(f"Uncommitted: {name}.")
        (pytester.path / name).unlink()
    project.write("bench/test_own.py", "")
    assert "Uncommitted: bench/test_own.py." in refused("--reason=r")
    project.git("checkout", "-q", ".")
    assert run("--perf-update", "--reason=r").ret == 0


def test_gains_are_kept_by_one_command(pytester: pytest.Pytester, run: Run) -> None:
    """All cases that improved beyond their tolerance are named by one command, which accepts them."""
    bench(pytester, GIB, GIB)
    lower(pytester, run, 2 * GIB)
    result = run()
    assert result.ret == 0
    result.stdout.fnmatch_lines([
        "2 cases are better than accepted. Keep the gain, so that it cannot be lost unnoticed:",
        "*pytest --benchmark --case 'test_own/test_step' --case 'test_own/test_other' --perf-update --reason \"…\"",
    ])  # fmt: skip
