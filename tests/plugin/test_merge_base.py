"""A pull request that changes the rules it is judged by: limits, waivers, the folder of baselines, pytest's settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_core.cli.commands import app
from hpc_core.plugin import options, runner, suite
from hpc_core.plugin.base import pytest_settings
from tests.plugin.scripted_launcher import ScriptedLauncher
from tests.plugin.scripted_project import lower
from tests.record.git_project import GitProject

pytestmark = pytest.mark.slow
Run = Callable[..., pytest.RunResult]

GIB = 2**30
INI = """[tool.pytest.ini_options]
addopts = ["-p", "no:cacheprovider"]
filterwarnings = ["error"]
"""
WAIVER = """[[waiver]]
case = "*"
metric = "peak_bytes"
limit = "+900 %"
reason = "it is fine"
owner = "mallory"
expires = 9999-12-31
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Make a project whose main accepts half of what the suite takes, and go to the branch of a pull request."""
    monkeypatch.setattr(runner, "Launcher", ScriptedLauncher)
    monkeypatch.setenv("HPC_CORE_COMMIT", "0123abc")
    (pytester.path / "pyproject.toml").write_text(INI)
    pytester.mkdir("bench")
    bench(pytester, GIB)

    def ran(*arguments: str) -> pytest.RunResult:
        return pytester.runpytest_inprocess("--benchmark", *arguments)

    lower(pytester, ran, GIB // 2)
    project = GitProject(pytester.path)
    project.commit("accepted")
    project.git("checkout", "-q", "-b", "topic")
    return ran


def bench(pytester: pytest.Pytester, peak: int, limits: str = "", name: str = "step") -> None:
    """Write the suite: one test that takes this peak."""
    more = f", limits=Limits({limits})" if limits else ""
    text = f"from hpc_core import Limits\n\ndef test_{name}(perf):\n    perf('scripted:step', peak={peak}{more})\n"
    (pytester.path / "bench" / "test_own.py").write_text(text)


def loosened(result: pytest.RunResult) -> list[str]:
    """Return the lines of the section on what is loosened."""
    lines = result.outlines
    start = next(at for at, line in enumerate(lines) if "= loosened since the merge base with" in line)
    end = next(at for at, line in enumerate(lines[start + 1 :], start + 1) if line.startswith("==="))
    return lines[start + 1 : end]


def test_a_pull_request_that_loosens_nothing(run: Run) -> None:
    """The section says so."""
    result = run("--perf-base", "main")
    assert result.ret == 1
    assert loosened(result) == ["nothing"]


def test_a_looser_limit_has_no_effect_and_is_named(
    pytester: pytest.Pytester, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is in the terminal, in pytest-benchmark's JSON, and in the report's Markdown and JSON, each with its old value."""
    bench(pytester, GIB, 'peak_bytes="900%"')
    assert run().ret == 0
    result = run("--perf-base", "main", "--benchmark-json=out.json", "--perf-records=records")
    assert result.ret == 1
    line = "limit on peak_bytes of test_own/test_step: +0.05 % → +900 %"
    assert loosened(result) == [line]
    result.stdout.fnmatch_lines([f"*without effect until the case is accepted with it: {line}"])
    found = json.loads((pytester.path / "out.json").read_text())["hpc_core"]
    assert found["loosened"] == [
        {"what": "limit on peak_bytes of test_own/test_step", "old": "+0.05 %", "new": "+900 %"}
    ]
    records = pytester.path / "records"
    markdown = pytester.path / "report.md"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        app(["report", str(records), "--markdown", str(markdown), "--json"])
    assert json.loads(capsys.readouterr().out)["loosened"] == [line]
    assert (
        "**Loosened since the merge base:**\n\n- limit on peak\\_bytes of test\\_own/test\\_step: \\+0.05 % → \\+900 %"
        in (markdown.read_text())
    )
    run("--perf-records=records")
    assert not (records / "pull-request.json").exists()


def test_an_accepted_limit_is_named_and_hides_nothing(pytester: pytest.Pytester, run: Run) -> None:
    """A limit that the pull request accepts with its case holds after the merge; a value that it did not accept stays red."""
    bench(pytester, GIB, 'peak_bytes="900%"')
    baseline = next(pytester.path.rglob("test_step.json"))
    lower(pytester, run, GIB // 2 + 4096)
    assert "900%" in baseline.read_text()
    result = run("--perf-base", "main")
    assert result.ret == 1
    assert loosened(result) == ["limit on peak_bytes of test_own/test_step: +0.05 % → +900 %"]
    assert run("--perf-update", "--reason", "all of it", "--perf-base", "main").ret == 0
    accepted = run("--perf-base", "main")
    assert accepted.ret == 0
    assert loosened(accepted) == ["limit on peak_bytes of test_own/test_step: +0.05 % → +900 %"]


def test_a_tighter_limit_holds_at_once(pytester: pytest.Pytester, run: Run) -> None:
    """What is stricter than at the merge base needs no acceptance, and is not named."""
    run("--perf-update", "--reason", "as it is")
    GitProject(pytester.path).commit("accepted")
    bench(pytester, GIB, f"peak_bytes={GIB // 4}")
    result = run("--perf-base", "topic")
    assert result.ret == 1
    assert "= loosened since the merge base with topic" in str(result.stdout)
    assert "limit on peak_bytes" not in str(result.stdout)


def test_a_new_case_has_the_limits_of_its_code(pytester: pytest.Pytester, run: Run) -> None:
    """There is nothing to loosen: it has no baseline at the merge base."""
    bench(pytester, GIB, f"peak_bytes={2 * GIB}", name="other")
    result = run("--perf-base", "main", "--perf-update", "--reason", "new", "bench")
    assert result.ret == 0
    assert loosened(result) == ["nothing"]


def test_a_waiver_counts_from_the_merge_on(pytester: pytest.Pytester, run: Run) -> None:
    """A pull request that waives its own regression is red and names the waiver; on a branch whose base has it, it counts."""
    (pytester.path / "perf-waivers.toml").write_text(WAIVER)
    assert run().ret == 0
    result = run("--perf-base", "main")
    assert result.ret == 1
    assert loosened(result) == [
        "waiver of peak_bytes of *: none → up to +900 % until 9999-12-31 by mallory (it is fine)"
    ]
    result.stdout.fnmatch_lines(["*this pull request waives peak_bytes: a waiver counts from the merge on*"])
    project = GitProject(pytester.path)
    project.commit("the waiver")
    project.git("branch", "-f", "merged")
    later = run("--perf-base", "merged")
    assert later.ret == 0
    assert loosened(later) == ["nothing"]
    (pytester.path / "perf-waivers.toml").unlink()
    assert run("--perf-base", "merged").ret == 1  # a waiver that is taken back is gone at once


@pytest.mark.parametrize("way", ["perf_baselines", "addopts", "pytest.ini"])
def test_another_folder_of_baselines_is_named_and_the_old_one_judges(
    pytester: pytest.Pytester, run: Run, way: str
) -> None:
    """Moved by a setting, an option in the settings, or settings of their own: the merge base's folder still decides."""
    (pytester.path / "elsewhere").mkdir()
    if way == "pytest.ini":
        (pytester.path / "pytest.ini").write_text("[pytest]\nperf_baselines = elsewhere\nfilterwarnings = error\n")
    else:
        added = 'perf_baselines = "elsewhere"' if way == "perf_baselines" else ""
        options = ', "--perf-baselines=elsewhere"' if way == "addopts" else ""
        (pytester.path / "pyproject.toml").write_text(INI.replace('"]', f'"{options}]', 1) + added)
    assert run("--perf-update", "--reason", "moved").ret == 0
    (pytester.path / "elsewhere" / "cpu" / "test_own" / "test_step.json").unlink()
    result = run("--perf-base", "main")
    assert result.ret == 1
    assert "setting perf_baselines: baselines → elsewhere" in loosened(result) or any(
        "setting addopts: " in line and "elsewhere" in line for line in loosened(result)
    )
    result.stdout.fnmatch_lines(["*test_own/test_step: peak_bytes +512.00 MiB, limit*"])


def test_a_folder_that_moves_with_its_files_is_compared(pytester: pytest.Pytester, run: Run) -> None:
    """The same baselines in another folder are no change."""
    GitProject(pytester.path).git("mv", "baselines", "elsewhere")
    (pytester.path / "pyproject.toml").write_text(INI + 'perf_baselines = "elsewhere"')
    result = run("--perf-base", "main")
    assert result.ret == 1
    assert loosened(result) == ["setting perf_baselines: baselines → elsewhere"]
    result.stdout.fnmatch_lines(["*baselines changed since the merge base*", "none"])


def test_a_suite_that_shrinks_is_named(pytester: pytest.Pytester, run: Run) -> None:
    """Paths that no longer run are a loosening; more paths are none."""
    (pytester.path / "pyproject.toml").write_text(INI + 'perf_paths = ["bench", "more"]')
    assert loosened(run("--perf-base", "main")) == ["nothing"]
    GitProject(pytester.path).commit("more")
    (pytester.path / "pyproject.toml").write_text(INI + 'perf_paths = ["bench"]')
    GitProject(pytester.path).git("branch", "-f", "wide")
    result = run("--perf-base", "wide")
    assert "setting perf_paths: bench more → bench" in str(result.stdout)


def test_a_case_that_is_no_longer_judged_is_named(pytester: pytest.Pytester, run: Run) -> None:
    """It ran and was judged at the merge base: now nothing judges it, or no test runs it."""
    bench(pytester, GIB)
    own = pytester.path / "bench" / "test_own.py"
    own.write_text(own.read_text().replace(f"peak={GIB}", f"peak={GIB}, judge=False"))
    unjudged = run("--perf-base", "main")
    assert unjudged.ret == 0
    assert loosened(unjudged) == ["case test_own/test_step on cpu: judged → runs with judge=False"]
    bench(pytester, GIB, name="other")
    assert loosened(run("--perf-base", "main")) == ["case test_own/test_step on cpu: judged → no test runs it"]
    assert loosened(run("--perf-base", "main", "bench")) == ["nothing"]  # paths were chosen by hand


def test_a_changed_case_that_is_accepted_anew_is_named(pytester: pytest.Pytester, run: Run) -> None:
    """Nothing compares it with the merge base's baseline, so the pull request's judges it: both values are named."""
    own = pytester.path / "bench" / "test_own.py"
    own.write_text(own.read_text().replace(f"peak={GIB}", f"peak={GIB}, steps=11"))
    assert run("--perf-update", "--reason", "one step more").ret == 0
    result = run("--perf-base", "main", "--perf-strict")
    assert result.ret == 0
    (line,) = loosened(result)
    digest = r"digest [0-9a-f]+ "
    assert re.fullmatch(
        rf"case of test_own/test_step on cpu, accepted anew: {digest}\(peak_bytes 512.00 MiB\) → {digest}\(peak_bytes 1.00 GiB\)",
        line,
    )


def test_a_deleted_baseline_is_named(pytester: pytest.Pytester, run: Run) -> None:
    """It judges this pull request, and nothing after the merge; so does one that nobody can read."""
    baseline = next(pytester.path.rglob("test_step.json"))
    raw = baseline.read_text()
    day = json.loads(raw)["accepted"]["at"][:10]
    was = f"baseline of test_own/test_step on cpu: 2 metrics, accepted {day}: doctored"
    baseline.unlink()
    result = run("--perf-base", "main")
    assert result.ret == 1
    assert loosened(result) == [f"{was} → deleted"]
    baseline.write_text(raw[:100])
    assert loosened(run("--perf-base", "main")) == [f"{was} → damaged"]


def test_a_limit_that_is_removed_is_named(pytester: pytest.Pytester, run: Run) -> None:
    """Absolute or tighter than the default: its old value is in the line, whether the case is accepted anew or not."""
    bench(pytester, GIB, f'peak_bytes={2 * GIB}, operators="0.01%"')
    run("--perf-update", "--reason", "with limits")
    GitProject(pytester.path).commit("limits")
    GitProject(pytester.path).git("branch", "-f", "limited")
    bench(pytester, GIB)
    for _ in range(2):
        found = loosened(run("--perf-base", "limited"))
        assert "absolute limit on peak_bytes of test_own/test_step: 2.00 GiB → none" in found
        run("--perf-update", "--reason", "without")


@pytest.mark.parametrize(
    ("way", "line"),
    [
        ("perf_on_request", "judged → not measured, and bench/test_own.py changed"),
        ("perf_gpu", "judged → not measured, and bench/test_own.py changed"),
        ("skip", "judged → not measured, and bench/test_own.py changed"),
        ("a conftest.py", "judged → not measured, and bench/conftest.py changed"),
    ],
)
def test_a_case_that_no_longer_runs_by_itself_is_named(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch, way: str, line: str
) -> None:
    """A mark makes it wait for a request, need a GPU, or skips it, in its file or from a conftest.py."""
    for module in (options, suite):
        monkeypatch.setattr(module, "visible_gpus", tuple)
    own = pytester.path / "bench" / "test_own.py"
    step = own.read_text()
    two = f"import pytest\n{step}\ndef test_other(perf):\n    perf('scripted:step', peak={GIB})\n"
    own.write_text(two)
    run("--perf-update", "--reason", "two")
    GitProject(pytester.path).commit("two")
    GitProject(pytester.path).git("branch", "-f", "two")
    if way == "a conftest.py":
        (pytester.path / "bench" / "conftest.py").write_text(
            "import pytest\n\ndef pytest_collection_modifyitems(items):\n    items[0].add_marker(pytest.mark.skip)\n"
        )
    else:
        own.write_text(two.replace("def test_step", f"@pytest.mark.{way}\ndef test_step"))
    assert loosened(run("--perf-base", "two")) == [f"case test_own/test_step on cpu: {line}"]
    GitProject(pytester.path).commit("as it was before")
    GitProject(pytester.path).git("branch", "-f", "two")
    assert loosened(run("--perf-base", "two")) == ["nothing"]  # it was so at the merge base


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ('python_files = ["test_other*.py"]', "setting python_files: 'test_*.py' '*_test.py' → 'test_other*.py'"),
        ('python_functions = ["check"]', "setting python_functions: test → check"),
        ('python_classes = ["Check"]', "setting python_classes: Test → Check"),
        ('norecursedirs = ["bench"]', "setting norecursedirs: none → bench"),
        ('perf_processes = "1"', "setting perf_processes: auto → 1"),
        ('perf_waivers = "mine.toml"', "setting perf_waivers: perf-waivers.toml → mine.toml"),
        ('perf_paths = ["elsewhere"]', "setting perf_paths: bench → elsewhere"),
    ],
)
def test_a_setting_by_which_less_is_judged_is_named(
    pytester: pytest.Pytester, run: Run, setting: str, line: str
) -> None:
    """What pytest collects, how often a case runs, and the file of waivers: each with its value at the merge base, or the default."""
    (pytester.path / "mine.toml").write_text("")
    (pytester.path / "elsewhere").mkdir()
    bench_file = pytester.path / "bench" / "test_own.py"
    for folder in ("bench", "elsewhere"):  # so that something runs whatever the setting is
        (pytester.path / folder / "test_other_one.py").write_text(bench_file.read_text())
    (pytester.path / "pyproject.toml").write_text(INI + setting)
    result = run("--perf-base", "main", "--import-mode=importlib")
    assert line in loosened(result)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("pyproject.toml", "[tool.pytest.ini_options]\nperf_baselines = 'x'\n", {"perf_baselines": "x"}),
        ("pyproject.toml", "[tool.pytest]\nperf_baselines = 'x'\n", {"perf_baselines": "x"}),
        ("pyproject.toml", "[project]\nname = 'x'\n", None),
        ("pyproject.toml", "not TOML", None),
        ("pytest.toml", "[pytest]\nperf_baselines = 'x'\n", {"perf_baselines": "x"}),
        ("pytest.ini", "[pytest]\nperf_baselines = x\n", {"perf_baselines": "x"}),
        ("pytest.ini", "", {}),
        ("tox.ini", "[pytest]\nperf_baselines = x\n", {"perf_baselines": "x"}),
        ("tox.ini", "[tox]\n", None),
        ("setup.cfg", "[tool:pytest]\nperf_baselines = x\n", {"perf_baselines": "x"}),
        ("setup.cfg", "no section\n", None),
    ],
)
def test_settings_are_read_where_pytest_reads_them(name: str, text: str, expected: dict[str, str] | None) -> None:
    """A file without a section for pytest holds no settings, except pytest.ini."""
    assert pytest_settings(Path(name), text.encode()) == expected
