"""Texts from the package, the hub and files."""

from __future__ import annotations

import ast
import json
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from hpc_core.builders.data.texts import Problem, problems, texts
from hpc_core.case.errors import DataError, MissingLibraryError
from hpc_core.case.parts import DataSpec

SHARED = Path(__file__).parents[4] / "shared" / "data"
PROBLEMS = problems()
NUMBER = r"\d+(?:\.\d+)?"
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def computed(text: str) -> Fraction:
    """The exact value of an arithmetic expression."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant)
        return Fraction(str(node.value))

    return value(ast.parse(text, mode="eval").body)


def from_file(path: Path, rows: int | None = None) -> list[str]:
    return texts(DataSpec(source="file", name=str(path), rows=rows))


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


# In the package


def test_there_are_enough_problems_of_varied_length() -> None:
    """At least 48 different problems; short ones have about a dozen words, long ones several times as many."""
    questions = [problem.question for problem in PROBLEMS]
    assert len(set(questions)) == len(questions) >= 48
    words = sorted(len(question.split()) for question in questions)
    assert 8 <= words[0] <= 15
    assert 60 <= words[-1] <= 100


@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
def test_every_answer_is_right(problem: Problem) -> None:
    """Each annotation <<a*b=c>> computes to c and is followed by c; the last line repeats the last result."""
    annotations = re.findall(rf"<<([^<>=]+)=({NUMBER})>>({NUMBER})", problem.answer)
    assert annotations
    assert len(annotations) == problem.answer.count("<<")
    for expression, result, repeated in annotations:
        assert computed(expression) == Fraction(result)
        assert repeated == result
    assert problem.answer.splitlines()[-1] == f"#### {annotations[-1][1]}"
    assert problem.answer.count("####") == 1


@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
def test_every_answer_uses_known_numbers(problem: Problem) -> None:
    """A number in a calculation is in the question, was computed before, or is a common one."""
    common = {"1", "2", "3", "4", "5", "6", "7", "10", "12", "30", "60", "100", "1000"}
    known = common | {number.rstrip(".").replace(",", "") for number in re.findall(r"\d[\d.,]*", problem.question)}
    for expression, result in re.findall(rf"<<([^<>=]+)=({NUMBER})>>", problem.answer):
        unknown = {number for number in re.findall(NUMBER, expression) if Fraction(number) not in map(Fraction, known)}
        assert not unknown
        known.add(result)


def test_paragraphs_have_the_shape_of_wikitext() -> None:
    """Headings stand between empty rows, about a third of the rows are empty, and some paragraphs are long."""
    rows = texts(DataSpec(source="embedded", name="paragraphs"))
    assert len(rows) >= 300
    assert 0.28 <= rows.count("") / len(rows) <= 0.40
    headings = [number for number, row in enumerate(rows) if re.fullmatch(r" (= )+[^=]+( =)+ ", row)]
    assert len(headings) >= 40
    assert all(rows[number - 1] == rows[number + 1] == "" for number in headings)
    paragraphs = [row for row in rows if row and not row.startswith(" =")]
    assert len(paragraphs) >= 120
    assert len(set(paragraphs)) == len(paragraphs)
    assert sum(150 <= len(row.split()) <= 300 for row in paragraphs) >= 8


def test_embedded_problems_are_their_questions() -> None:
    """source="embedded" gives the questions in order, and rows= takes the first ones."""
    rows = texts(DataSpec(source="embedded", name="problems", rows=5))
    assert rows == [problem.question for problem in PROBLEMS[:5]]


def test_more_rows_than_there_are_is_refused() -> None:
    """More rows than there are problems are refused with their number."""
    with pytest.raises(DataError, match=rf"5000 rows .*has {len(PROBLEMS)}: use rows={len(PROBLEMS)} or fewer"):
        texts(DataSpec(source="embedded", name="problems", rows=5000))


def test_random_ids_have_no_texts() -> None:
    """A source without texts is refused with the alternatives."""
    with pytest.raises(DataError, match="source='trace' has token ids but no texts"):
        texts(DataSpec(source="trace", name="gsm8k"))


# Files


def test_text_file_keeps_empty_rows(tmp_path: Path) -> None:
    """A file has one row per line; blank lines are empty rows, and Windows' line ends work too."""
    path = written(tmp_path / "rows.txt", "")
    path.write_bytes(b" \r\n = Title = \r\n\r\n one\x0ctwo \xe2\x80\xa8three\r\n")
    assert from_file(path) == ["", " = Title = ", "", " one\x0ctwo \u2028three"]


def test_json_lines_take_question_before_text(tmp_path: Path) -> None:
    """A row is the field `question`, else `text`; blank lines are skipped and a byte order mark is ignored."""
    lines = '\ufeff{"question": "How?", "text": "no"}\n\n{"text": "yes"}\n{"text": ""}\n'
    assert from_file(written(tmp_path / "rows.jsonl", lines)) == ["How?", "yes", ""]


def test_file_rows_are_limited(tmp_path: Path) -> None:
    """rows=2 takes the first two lines of a file."""
    assert from_file(written(tmp_path / "rows.raw", "a\nb\nc\n"), rows=2) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl line 2 is not JSON: .* at column 10"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"line 2 holds a JSON list"),
        ("a.jsonl", '{"body": "a", "id": 1}\n', r"line 1 has no field 'question' or 'text' but 'body', 'id'"),
        ("a.jsonl", "{}\n", r"line 1 has no field 'question' or 'text' but none"),
        ("a.jsonl", '{"text": 5}\n', r"line 1: 'text' is int, not text"),
        ("a.jsonl", "", r"holds no text \(0 characters"),
        ("a.txt", " \n\n", r"holds no text \(3 characters"),
        ("a.csv", "a\n", r"ends in '\.csv': name it \.jsonl"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    """A file without rows or in another format is refused with file, line and reason."""
    with pytest.raises(DataError, match=message):
        from_file(written(tmp_path / name, content))


def test_a_missing_file_is_refused_with_the_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing relative path is reported as an absolute one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=re.escape(f"looked for {tmp_path / 'none.txt'}")):
        from_file(Path("none.txt"))


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    """A file that is not UTF-8 is refused with the position of the first bad byte."""
    path = tmp_path / "latin.txt"
    path.write_bytes("abc é".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 at byte 4"):
        from_file(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """A folder cannot be read as a file."""
    (tmp_path / "rows.txt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        from_file(tmp_path / "rows.txt")


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data with the real data sets is not here")
def test_real_data_sets_are_read() -> None:
    """GSM8K's 1319 test questions and WikiText's 4358 test rows are read as they are on the hub."""
    questions = from_file(SHARED / "gsm8k" / "test.jsonl")
    assert len(questions) == 1319
    assert questions[0].startswith("Janet\u2019s ducks lay 16 eggs per day.")
    rows = from_file(SHARED / "wikitext2" / "wiki.test.raw")
    assert len(rows) == 4358
    assert rows[:3] == ["", " = Robert Boulter = ", ""]
    assert rows[:4000].count("") == 1355  # as many as the recorded lengths have rows of one token


# Hub


@pytest.mark.parametrize(
    ("name", "asked", "field", "stored", "expected"),
    [
        ("gsm8k", ("openai/gsm8k", "main"), "question", ["How many?", "How far?"], ["How many?", "How far?"]),
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "text", ["", " = A = \n"], ["", " = A = "]),
    ],
)
def test_hub_rows_come_from_the_test_split(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    asked: tuple[str, str],
    field: str,
    stored: list[str],
    expected: list[str],
) -> None:
    """The right repository, configuration, split and field are read; a local table replaces the download."""
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset
    path = written(tmp_path / "stored.jsonl", "".join(json.dumps({field: row, "other": "x"}) + "\n" for row in stored))
    requests: list[Any] = []

    def local(*arguments: str, split: str) -> Any:
        requests.append((*arguments, split))
        return load("json", data_files={split: str(path)}, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert texts(DataSpec(source="hub", name=name)) == expected
    assert requests == [(*asked, "test")]


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline and with an empty cache, the error names both alternatives."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"openai/gsm8k.*use source='file' with a local copy, or source='embedded'"):
        texts(DataSpec(source="hub", name="gsm8k"))


def test_a_hub_table_without_the_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the table lacks the field, the error names its columns."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"prompt": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    with pytest.raises(DataError, match="no field 'question' but prompt"):
        texts(DataSpec(source="hub", name="gsm8k"))


def test_without_datasets_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `datasets` the error names the pip command."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingLibraryError, match=r"package datasets.*pip install 'hpc-core\[hub\]'"):
        texts(DataSpec(source="hub", name="gsm8k"))


def test_importing_the_package_loads_no_heavy_library() -> None:
    """The data modules and the embedded texts load neither torch nor transformers nor datasets nor numpy."""
    code = (
        "import sys\n"
        "from hpc_core.case import lengths\nfrom hpc_core.builders.data import batching, rows, texts\n"
        "texts.problems(); lengths.recorded_lengths('gsm8k')\n"
        "print(sorted({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "path", "content"),
    [
        ("gsm8k", "gsm8k/test.jsonl", '{"question": "One and one?"}\n'),
        ("wikitext2", "wikitext2/wiki.test.raw", "One.\n"),
    ],
)
def test_a_local_copy_stands_in_for_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, path: str, content: str
) -> None:
    """A data set in the folder HPC_CORE_DATA is read from there, without the hub."""
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(content, encoding="utf-8")
    monkeypatch.setenv("HPC_CORE_DATA", str(tmp_path))
    monkeypatch.setattr("hpc_core.builders.data.texts._through_datasets", None)

    assert texts(DataSpec(source="hub", name=name)) in (["One and one?"], ["One."])
