"""Every error a user can cause.

All of them are :class:`AnomalibLiteError`, so one ``except`` catches what this library
refuses and lets real faults through. Each also is the built-in (or scikit-learn) error
that Python programmers expect in its place, so ``except ValueError`` works too.

Every message follows one template: what is wrong, where, what was expected, what was
got, and the remedy.
"""

from __future__ import annotations

from sklearn.exceptions import NotFittedError as _SklearnNotFittedError

__all__ = [
    "AnomalibLiteError",
    "CalibrationWarning",
    "ImageError",
    "InvalidTypeError",
    "InvalidValueError",
    "MissingDependencyError",
    "MissingPathError",
    "ModelFileError",
    "NotFittedError",
    "OutputError",
    "WorkerError",
]


class AnomalibLiteError(Exception):
    """Base of every error that this library raises on purpose.

    Examples
    --------
    >>> from anomalib_lite import PatchCore
    >>> from anomalib_lite.errors import AnomalibLiteError
    >>> try:
    ...     PatchCore(coreset_ratio=1.5).fit_embeddings([])
    ... except AnomalibLiteError as error:
    ...     print(error)
    PatchCore: coreset_ratio must be a number in (0, 1], got 1.5.
    """


class InvalidValueError(AnomalibLiteError, ValueError):
    """An argument has a value outside of what is allowed."""


class InvalidTypeError(AnomalibLiteError, TypeError):
    """An argument is of a type that is not understood."""


class ImageError(InvalidValueError):
    """One image cannot be used: broken, of the wrong size, of the wrong channels, not finite."""


class MissingPathError(InvalidValueError, FileNotFoundError):
    """A file or directory that was named does not exist."""

    def __str__(self) -> str:
        # OSError would print errno and filename, of which there are none here.
        return str(self.args[0])


class OutputError(AnomalibLiteError, OSError):
    """A file or directory cannot be written."""

    def __str__(self) -> str:
        return str(self.args[0])


class ModelFileError(InvalidValueError):
    """A model file is cut short, not ours, of a newer format, or fitted with other weights."""


class MissingDependencyError(AnomalibLiteError, ImportError):
    """An optional package is needed for what was asked, and is not installed."""


class WorkerError(AnomalibLiteError, RuntimeError):
    """A worker process that ``n_jobs`` asked for ended, or could not be given its work."""


class NotFittedError(AnomalibLiteError, _SklearnNotFittedError):
    """Scores were asked of a detector that has not been fitted; also scikit-learn's error."""


class CalibrationWarning(UserWarning):
    """Too few normal images were at hand to guarantee the false-alarm rate that was asked for."""
