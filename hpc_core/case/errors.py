"""Every error that hpc-core raises on purpose.

HpcCoreError
├── SpecError                a case, limit or option contradicts itself or names something unknown
├── MissingLibraryError      an optional package that this case needs is not installed
├── DataError                prompts or rows are not available in the requested form
│   └── MissingDataError     a data set is not on this machine and cannot be fetched
├── BuildError               the model that was built is not the one that the case describes
├── MeasureError             an instrument saw something that makes its own reading void
├── PredictError             a case cannot be predicted, or this machine cannot predict
│   └── MissingCompilerError prediction needs a C++ compiler; also a MissingLibraryError
├── LaunchError              no worker process could be started at all
├── RepositoryError          git has no repository, no such revision or no merge base
└── BaselineError            a baseline cannot be written, or must not be

A message says what happened with its numbers, against which limit, and what to do next.
"""

from __future__ import annotations


class HpcCoreError(Exception):
    """Anything hpc-core refuses on purpose; its text is meant for the user."""


class SpecError(HpcCoreError, ValueError):
    """A case, limit or option contradicts itself. A ValueError, so that msgspec reports it with the JSON path."""


class MissingLibraryError(HpcCoreError):
    """An optional package that this case needs is not installed."""


class DataError(HpcCoreError):
    """Prompts or rows cannot be had in the form asked for."""


class MissingDataError(DataError):
    """A data set is not on this machine and cannot be fetched."""


class BuildError(HpcCoreError):
    """The model that was built is not the one asked for."""


class MeasureError(HpcCoreError):
    """An instrument saw something that makes its own reading void."""


class LaunchError(HpcCoreError):
    """No worker process could be started at all."""


class BaselineError(HpcCoreError):
    """A baseline cannot be written, or must not be."""


class RepositoryError(HpcCoreError):
    """Git cannot say what was asked: no repository, no such revision, no merge base."""


class PredictError(HpcCoreError):
    """A case cannot be predicted: something in it has no model here, or the machine cannot predict at all."""


class MissingCompilerError(PredictError, MissingLibraryError):
    """Prediction needs a C++ compiler once, and this machine has none: something to install, no fault of the case."""
