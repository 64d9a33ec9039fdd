"""Starting a forkserver, waiting until it has preloaded, and asking it for workers. Its own side is `forkserver`."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hpc_core.launch.channel import Channel
from hpc_core.launch.forkserver import Preloaded, Request
from hpc_core.launch.interpreter import worker_environment

_MESSAGE_BYTES = 1 << 20
_CLOSE_S = 5.0


class NoForkserver(Exception):  # noqa: N818 - the launcher starts fresh interpreters instead
    """The forkserver could not preload, or has ended; the text says why in a sentence."""


class Forkserver:
    """A process with torch and transformers imported, which forks a worker whenever it is asked to.

    Args:
        python: its interpreter, a program that exists.
        environment: variables that it and its workers have beyond this process's.
        preload_limit_s: seconds that its imports may take.
        folder: its workers' working directory and its own; without one, this process's at the time of the request.
        predicting: whether its workers predict, and so need the fake CUDA device.
        preload: further packages to import, if workers can use CUDA afterwards.

    Raises:
        NoForkserver: it did not get ready within `preload_limit_s` seconds.
    """

    def __init__(
        self,
        python: str,
        environment: dict[str, str] | None,
        *,
        preload_limit_s: float,
        folder: Path | None = None,
        predicting: bool = False,
        preload: Sequence[str] = (),
    ) -> None:
        extra = worker_environment(environment)
        self._folder = folder
        self._extra = extra
        self._base = dict(os.environ)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._line, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = str(remote.fileno())
        command = (
            python,
            "-m",
            "hpc_core.launch.forkserver",
            "--socket-fd",
            fd,
            "--preload-limit",
            str(preload_limit_s),
            *(("--predicting",) if predicting else ()),
            *(("--preload", ",".join(preload)) if preload else ()),
        )
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(remote.fileno(),),
                env=self._base | extra,
                cwd=folder,
                start_new_session=True,  # Ctrl-C in the terminal is the launcher's business
            )
        except OSError as error:
            self._line.close()
            self._log.close()
            raise NoForkserver(f"{python} could not be started: {error}.") from error
        finally:
            remote.close()
        try:
            self.preloaded = self._await_preload(preload_limit_s)
        except BaseException:
            self.close(wait_s=0)
            raise

    def _await_preload(self, limit_s: float) -> Preloaded:
        readable, _, _ = select.select([self._line], [], [], limit_s)
        if not readable:
            raise NoForkserver(f"Preloading torch and transformers took longer than its limit of {limit_s:g} s.")
        message = self._line.recv(_MESSAGE_BYTES)
        if not message:
            code = self._process.wait()
            raise NoForkserver(f"Preloading torch and transformers ended with exit code {code}: {self._last_line()}")
        return msgspec.json.decode(message, type=Preloaded)

    def _last_line(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), 4000, max(0, size - 4000)).decode("utf-8", "replace")
        return (text.strip().splitlines() or ["it printed nothing"])[-1]

    def start(self, channel: Channel) -> None:
        """Fork a supervisor and a worker on the channel's descriptors, and hand those over.

        Raises:
            NoForkserver: the forkserver has ended.
        """
        folder = os.fspath(self._folder or Path.cwd())
        request = Request(folder=folder, environment=self._changed_environment())
        try:
            socket.send_fds(self._line, [msgspec.json.encode(request)], channel.for_supervisor)
        except OSError as error:
            raise NoForkserver(f"The forkserver has ended with exit code {self._process.poll()}: {error}.") from error
        channel.hand_over()

    def _changed_environment(self) -> dict[str, str | None]:
        """Return what changed in this process's environment since the forkserver started; variables chosen for workers stay."""
        now = dict(os.environ)
        changed: dict[str, str | None] = {name: now.get(name) for name in self._base.keys() | now.keys()}
        return {
            name: value for name, value in changed.items() if value != self._base.get(name) and name not in self._extra
        }

    def close(self, *, wait_s: float = _CLOSE_S) -> None:
        """End the forkserver; its workers, if any, end through their own supervisors. May be called again."""
        self._line.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()
