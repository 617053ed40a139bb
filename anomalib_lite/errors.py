"""Every error a user can cause.

All of them are :class:`AnomalibLiteError`: one ``except`` catches everything that this library
refuses, and no fault in its code. Each is also the built-in (or scikit-learn) error that Python
programmers expect, so that ``except ValueError`` works too.

Every message says what is wrong, where, what was expected, what was got, and the remedy.
"""

from __future__ import annotations

from sklearn.exceptions import NotFittedError as _SklearnNotFittedError

__all__ = [
    "AnomalibLiteError",
    "CalibrationWarning",
    "CopiesWarning",
    "ImageError",
    "InvalidTypeError",
    "InvalidValueError",
    "LeftOutWarning",
    "MissingDependencyError",
    "MissingPathError",
    "ModelFileError",
    "NotFittedError",
    "OutputError",
    "SharedImagesWarning",
    "WorkerError",
]


class AnomalibLiteError(Exception):
    """Base class of every error that this library raises on purpose.

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
    """An argument has a value that is not allowed."""


class InvalidTypeError(AnomalibLiteError, TypeError):
    """An argument has a type that is not allowed."""


class ImageError(InvalidValueError):
    """One image cannot be used: broken, of the wrong size, of the wrong channels, not finite."""


class MissingPathError(InvalidValueError, FileNotFoundError):
    """A file or directory does not exist."""

    def __str__(self) -> str:
        # OSError would print errno and filename, which this error does not have.
        return str(self.args[0])


class OutputError(AnomalibLiteError, OSError):
    """A file or directory cannot be written."""

    def __str__(self) -> str:
        return str(self.args[0])


class ModelFileError(InvalidValueError):
    """A model file is cut short, of another kind, of a newer format, or needs other weights."""


class MissingDependencyError(AnomalibLiteError, ImportError):
    """An optional package is needed and not installed."""


class WorkerError(AnomalibLiteError, RuntimeError):
    """A worker process of ``n_jobs`` ended early, or its task could not be sent to it."""


class NotFittedError(AnomalibLiteError, _SklearnNotFittedError):
    """A method needs a fitted detector; also scikit-learn's ``NotFittedError``."""


class SharedImagesWarning(UserWarning):
    """Test images are among the training images, so the test looks better than it is."""


class LeftOutWarning(UserWarning):
    """A directory holds what is not taken for an image: unknown suffixes, subdirectories."""


class CalibrationWarning(UserWarning):
    """There are too few normal images to guarantee the false-alarm rate that was asked for."""


class CopiesWarning(CalibrationWarning):
    """Images to fit on are copies of others, or show the same parts: they count as fewer."""
