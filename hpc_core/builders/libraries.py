"""Import an optional package, or report which one is missing and how to install it."""

from __future__ import annotations

import importlib
from types import ModuleType

from hpc_core.case.errors import MissingLibraryError

_EXTRA = {
    "bitsandbytes": "quantization",
    "datasets": "hub",
    "gguf": "gguf",
    "liger_kernel": "liger",
    "peft": "run",
    "torchao": "int4",
    "transformers": "run",
}


def library(name: str, needed_for: str) -> ModuleType:
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
        how = f"pip install 'hpc-core[{_EXTRA[package]}]'" if package in _EXTRA else f"pip install {package}"
        raise MissingLibraryError(
            f"{needed_for} needs the package {package}, which is not installed. Install it with: {how}"
        ) from error
