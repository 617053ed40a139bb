"""Checks of what users hand in. Every message says what, where, expected, got, remedy."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np

from anomalib_lite.errors import InvalidTypeError, InvalidValueError


def check_choice(name: str, value: object, choices: Iterable[str], where: str) -> str:
    """Return ``value`` if it is one of ``choices``; otherwise name them all and the closest."""
    valid = sorted(choices)
    if isinstance(value, str) and value in valid:
        return value
    raise InvalidValueError(
        f"{where}: {name} must be one of {valid}, got {value!r}.{closest(value, valid)}"
    )


def closest(value: object, choices: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest of ``choices``, or nothing."""
    matches = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def check_number(
    name: str,
    value: object,
    where: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """Return ``value`` as a float if it is a finite number inside the interval."""
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    if ok:
        number = float(value)  # type: ignore[arg-type]
        above = number > low if low_open else number >= low
        below = number < high if high_open else number <= high
        if math.isfinite(number) and above and below:
            return number
    raise InvalidValueError(f"{where}: {name} must be a number in {interval}, got {value!r}.")


def check_int(
    name: str, value: object, where: str, *, low: int, high: int | None = None
) -> int:
    """Return ``value`` as an int if it is a whole number of at least ``low``."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_):
        number = int(value)
        if number >= low and (high is None or number <= high):
            return number
    upper = "" if high is None else f" and at most {high}"
    raise InvalidValueError(
        f"{where}: {name} must be a whole number of at least {low}{upper}, got {value!r}."
    )


def check_matrix(name: str, value: Any, where: str, *, n_features: int | None = None) -> np.ndarray:
    """Return ``value`` as a C-contiguous (N, D) float32 array of finite numbers, N >= 1."""
    try:
        array = np.ascontiguousarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(
            f"{where}: {name} must be a numeric array of shape (N, D), got {type(value).__name__}."
        ) from error
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 1:
        raise InvalidValueError(
            f"{where}: {name} must have shape (N, D) with N and D of at least 1, "
            f"got {np.shape(value)}."
        )
    if n_features is not None and array.shape[1] != n_features:
        raise InvalidValueError(
            f"{where}: {name} must have {n_features} columns, as when fitted, "
            f"got {array.shape[1]}."
        )
    if not np.isfinite(array).all():
        raise InvalidValueError(
            f"{where}: {name} must be finite, got NaN or infinity. Remove such rows first."
        )
    return array
