"""What a pull request loosens, as a file beside the records of its run, for the reports that are made of them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from hpc_core.record.files import write_whole

NAME = "pull-request.json"


class Loosening(msgspec.Struct, frozen=True, kw_only=True):
    """A rule of the gate that is looser than at the merge base."""

    what: str
    """Such as "limit on peak_bytes of tiny/lora", "waiver of peak_bytes of tiny/*", "setting perf_baselines"."""
    old: str
    new: str

    @property
    def line(self) -> str:
        """Return it as a line: "limit on peak_bytes of tiny/lora: +0.05 % → +900 %"."""
        return f"{self.what}: {self.old} → {self.new}"


class PullRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run with `--perf-base` compared with, and what the pull request loosens."""

    revision: str
    """As the user named it."""
    merge_base: str
    loosened: tuple[Loosening, ...]


def write_pull_request(folder: Path, found: PullRequest | None) -> None:
    """Write the file beside the records; remove that of an earlier run where there is none."""
    if found is None:
        (folder / NAME).unlink(missing_ok=True)
    else:
        write_whole(folder / NAME, msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")


def pull_request_from_json(raw: bytes) -> PullRequest:
    """Parse the file.

    Raises:
        msgspec.MsgspecError: it is something else.
    """
    return msgspec.json.decode(raw, type=PullRequest)
