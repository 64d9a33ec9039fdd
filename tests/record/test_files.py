"""Only regular files of bounded size are read; a pipe or a device is written to and not replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_core.case.errors import SpecError
from hpc_core.record.files import read_record, read_regular, write_whole

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_a_pipe_is_written_to_and_stays(pipe: Path) -> None:
    """A reader gets the content, and the pipe is not replaced."""
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert pipe.is_fifo()
    assert [path.name for path in pipe.parent.iterdir()] == ["pipe"]


def test_a_pipe_without_a_reader_is_an_error(pipe: Path) -> None:
    """Writing to a pipe without a reader is an error instead of a wait."""
    with pytest.raises(OSError, match="nothing reads from this pipe") as error:
        write_whole(pipe, b"content")
    assert error.value.filename == str(pipe)


def test_a_terminal_is_written_to_and_stays() -> None:
    """A character device gets the content and is not replaced."""
    controller, terminal = os.openpty()
    path = Path(os.ttyname(terminal))
    write_whole(path, b"content")
    assert os.read(controller, 100) == b"content"
    assert path.is_char_device()
    os.close(controller)
    os.close(terminal)


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}", "link"])
def test_an_open_descriptor_is_appended_to(tmp_path: Path, name: str) -> None:
    """Content for `/dev/stdout` is appended to the file behind it, which is not replaced."""
    output = tmp_path / "output"
    with output.open("wb", buffering=0) as file:
        path = Path(name.format(file.fileno()))
        if name == "link":
            path = tmp_path / "link"
            path.symlink_to(f"/proc/self/fd/{file.fileno()}")
        file.write(b"before ")
        write_whole(path, b"content")
        file.write(b" after")
    assert output.read_bytes() == b"before content after"


def test_standard_output_stays_in_order(tmp_path: Path) -> None:
    """Content for `/dev/stdout` follows what was printed before."""
    code = "from pathlib import Path; from hpc_core.record.files import write_whole\nprint('one'); write_whole(Path('/dev/stdout'), b'two\\n'); print('three')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=30, cwd=ROOT)
    assert result.stdout == b"one\ntwo\nthree\n"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """The file behind a link is replaced or created, and the link stays."""
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    for content in (b"first", b"second"):
        write_whole(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "file").read_bytes() == content


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """If a write fails, the old file is unchanged, no temporary file is left, and the error names the file."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_whole(path, b"new")
    assert (error.value.filename, path.read_bytes()) == (str(path), b"old")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", [Path("/proc/nowhere/file"), Path("/dev/full"), Path("/")])
def test_what_cannot_be_written_is_named(path: Path) -> None:
    """The error names the given path of a folder, a full device or an unwritable file system."""
    with pytest.raises(OSError, match=r"^\[Errno") as error:
        write_whole(path, b"content")
    assert error.value.filename == str(path)


def test_a_name_of_the_longest_length_is_written(tmp_path: Path) -> None:
    """A file whose name has the maximum length can be written."""
    path = tmp_path / ("a" * 255)
    write_whole(path, b"content")
    assert path.read_bytes() == b"content"


def test_only_a_regular_file_of_bounded_size_is_read(tmp_path: Path, pipe: Path) -> None:
    """A pipe, a device behind a link, a folder and a file that is too large are refused."""
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for path in (pipe, tmp_path / "zeros"):
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(path)
        with pytest.raises(SpecError, match="not a regular file"):
            read_record(path)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    large = tmp_path / "large"
    large.write_bytes(bytes(2**20 + 1))
    assert len(read_regular(large)) == 2**20 + 1
    with pytest.raises(OSError, match="larger than 1 MiB, the most that is read"):
        read_regular(large, 2**20)
