"""Checks of arguments. Every message says what, where, what was expected, what was got, remedy."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from anomalib_lite.errors import InvalidTypeError, InvalidValueError


def alike(one: object, other: object) -> bool:
    """Tell whether two values of a parameter are the same; a list is one that a file has given.

    >>> alike((48, 80), [48, 80]), alike(None, 1), alike(0.5, 0.5)
    (True, False, True)
    """
    if one is other:
        return True
    if isinstance(one, list | tuple | np.ndarray) and isinstance(other, list | tuple | np.ndarray):
        return list(one) == list(other)
    return type(one) is type(other) and bool(np.all(one == other))


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


def check_number(name: str, value: object, where: str, interval: str) -> float:
    """Return ``value`` as a float if it is a finite number in an interval such as "(0, 1]"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    if isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_):
        number = float(value)
        above = number > low if interval[0] == "(" else number >= low
        below = number < high if interval[-1] == ")" else number <= high
        if math.isfinite(number) and above and below:
            return number
    raise InvalidValueError(f"{where}: {name} must be a number in {interval}, got {value!r}.")


def check_bool(name: str, value: object, where: str) -> None:
    """Raise InvalidTypeError unless ``value`` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise InvalidTypeError(f"{where}: {name} must be True or False, got {value!r}.")


def check_int(name: str, value: object, where: str, *, low: int, high: int | None = None) -> int:
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
            f"{where}: {name} must have {n_features} columns, as when fitted, got {array.shape[1]}."
        )
    check_values(name, array, where)
    return array


def check_values(name: str, array: np.ndarray, where: str) -> None:
    """Raise if a value is not finite, or so large that sums of squares could exceed float32."""
    largest = float(np.maximum(array.max(initial=0), -array.min(initial=0)))  # NaN if any is
    if not largest <= _LARGEST_VALUE:
        got = f"{largest:.3g}" if np.isfinite(largest) else "NaN or infinity"
        raise InvalidValueError(
            f"{where}: {name} must be finite and at most {_LARGEST_VALUE:g} in size, got {got}. "
            "Remove or rescale such rows first."
        )


def check_embeddings(
    E: Any, where: str, n_features: int | None = None
) -> np.ndarray | list[np.ndarray]:
    """Return ``E`` as (N, h, w, D) float32, or as a list of N (h, w, D), all finite."""
    as_list = isinstance(E, list | tuple)
    try:
        grids = [np.asarray(e, np.float32) for e in E] if as_list else np.asarray(E, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(
            f"{where}: E must be numeric, of shape (N, h, w, D), got {type(E).__name__}."
        ) from error
    if (isinstance(grids, np.ndarray) and grids.ndim == 0) or len(grids) == 0:
        raise InvalidValueError(
            f"{where}: E must have shape (N, h, w, D) with N of at least 1, got none."
        )
    for i, grid in enumerate(grids):
        n_features = check_grid(grid, i, where, n_features)
    return grids


def check_grid(grid: np.ndarray, i: int, where: str, n_features: int | None) -> int:
    """Return D of one image's embeddings (h, w, D), float32, if shape and values are valid."""
    as_expected = grid.ndim == 3 and n_features in (None, grid.shape[2])
    if not as_expected or 0 in grid.shape:
        d = n_features or "D"
        raise InvalidValueError(
            f"{where}: E must have shape (N, h, w, {d}), got {grid.shape} for E[{i}]."
        )
    check_values(f"E[{i}]", grid, where)
    return int(grid.shape[2])


# Sums of squares of such values stay far below the largest float32.
_LARGEST_VALUE = 1e15

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def check_memory(name: str, value: Any, where: str) -> int:
    """Return a number of bytes, given as such or as text: "512MB" (10^6) or "1GiB" (2^30)."""
    if isinstance(value, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?|)B", value.strip().upper())
        if found is not None and float(found[1]) > 0:
            return int(float(found[1]) * _UNITS[found[2]])
    elif isinstance(value, int | np.integer) and not isinstance(value, bool) and value > 0:
        return int(value)
    raise InvalidValueError(
        f"{where}: {name} must be a number of bytes or such as '512MB', '2GB' or '1GiB', "
        f"got {value!r}."
    )


def check_image_size(image_size: Any, where: str, *, stride: int = 1, auto: bool = False) -> None:
    """Raise if ``image_size`` is not an int or a pair that a backbone of ``stride`` can use.

    ``auto`` says that it may also be ``"auto"``.
    """
    if isinstance(image_size, str):
        if auto and image_size == "auto":
            return
        or_auto = ", a pair (H, W), or 'auto'" if auto else " or a pair (H, W)"
        raise InvalidValueError(
            f"{where}: image_size must be an int (the shorter side){or_auto}, got {image_size!r}."
        )
    sides = image_size if isinstance(image_size, tuple | list) else (image_size,)
    if sides is image_size and len(sides) != 2:
        raise InvalidValueError(
            f"{where}: image_size must be an int (the shorter side) or a pair (H, W), "
            f"got {image_size!r}."
        )
    for side in sides:
        check_int("image_size", side, where, low=16, high=8192)
    if min(sides) < stride:
        raise InvalidValueError(
            f"{where}: image_size must be at least the backbone's stride of {stride} pixels, "
            f"got {image_size!r}."
        )


def check_seed(random_state: Any, where: str) -> None:
    """Raise if ``random_state`` is not an int, a RandomState or None."""
    try:
        check_random_state(random_state)
    except ValueError as error:
        raise InvalidValueError(
            f"{where}: random_state must be a whole number of at least 0, a RandomState or None, "
            f"got {random_state!r}."
        ) from error


def check_labels(y: Any, n: int, where: str) -> np.ndarray:
    """Return ``n`` labels as int64, 0 for normal and 1 for anomalous."""
    try:
        labels = np.asarray(y)
    except ValueError:  # rows of different lengths
        labels = np.empty((0, 0))
    wrong = [value for value in labels.ravel().tolist() if value not in (0, 1)]
    if labels.shape != (n,) or wrong:
        raise InvalidValueError(
            f"{where}: y must hold {n} labels, 0 for normal and 1 for anomalous, got shape "
            f"{labels.shape}{f' with values such as {wrong[:5]}' if wrong else ''}."
        )
    return labels.astype(np.int64)


def normal_indices(y: Any, n: int, where: str) -> np.ndarray:
    """Return the positions of the normal images, those with label 0 among ``n`` labels ``y``."""
    labels = check_labels(y, n, where)
    if labels.all():
        raise InvalidValueError(f"{where}: y has no normal image (0); fit needs at least one.")
    return np.flatnonzero(labels == 0)


def refuse_labelled(images: Any, where: str, remedy: str) -> None:
    """Raise if ``images`` are samples of a data set of which one is labelled anomalous."""
    if isinstance(images, list | tuple) and any(getattr(item, "label", 0) for item in images):
        raise InvalidValueError(f"{where}: images holds samples labelled anomalous. {remedy}")


def check_groups(groups: Any, n: int, where: str) -> np.ndarray:
    """Number the groups of ``n`` images from 0, by first appearance; without, each is its own."""
    if groups is None:
        return np.arange(n)
    given = list(groups) if np.iterable(groups) and not isinstance(groups, str) else groups
    if not isinstance(given, list) or len(given) != n:
        raise InvalidValueError(
            f"{where}: groups must hold {n} values, one for each image, got "
            f"{len(given) if isinstance(given, list) else given!r}."
        )
    if isinstance(groups, np.ndarray) and groups.dtype.kind in "iu":  # often, and fast
        _, first, numbers_by_value = np.unique(groups, return_index=True, return_inverse=True)
        return np.asarray(np.argsort(np.argsort(first))[numbers_by_value], np.int64)
    numbers: dict[Any, int] = {}
    for i, value in enumerate(given):
        if not isinstance(value, str | int | np.integer):
            raise InvalidTypeError(
                f"{where}: groups must hold whole numbers or strings, got {value!r} at position "
                f"{i}."
            )
        numbers.setdefault(value, len(numbers))
    return np.array([numbers[value] for value in given], np.int64)
