"""Groups of images, such as photographs of one part, that are held back whole or not at all."""

from __future__ import annotations

import numpy as np

__all__ = ["folds_of", "group_starts", "order_of_fit", "whole_groups"]


def order_of_fit(
    order: np.ndarray, groups: np.ndarray, random: np.random.RandomState
) -> np.ndarray:
    """Draw an order in which the images of each group follow each other.

    Parameters
    ----------
    order : ndarray of shape (n,), int64
        An order of the images, which those of a group keep among themselves.
    groups : ndarray of shape (n,), int64
        The group of each image, from 0. Each order of the groups is equally likely, whatever their
        sizes.
    random : RandomState

    Returns
    -------
    ndarray of shape (n,), int64
        Positions of the images; those to hold back will be the last ones.

    Examples
    --------
    >>> groups = np.array([0, 0, 1, 2, 2, 2])
    >>> groups[order_of_fit(np.arange(6), groups, np.random.RandomState(0))].tolist()
    [2, 2, 2, 1, 0, 0]
    """
    places = random.permutation(groups.max() + 1)
    return order[np.argsort(places[groups[order]], kind="stable")]


def group_starts(groups: np.ndarray) -> np.ndarray:
    """Return where each group begins among images (n,) whose groups follow each other.

    >>> group_starts(np.array([1, 2, 2, 2, 0, 0])).tolist()
    [0, 1, 4]
    """
    return np.flatnonzero(np.append(True, groups[1:] != groups[:-1])[: len(groups)])


def whole_groups(groups: np.ndarray, most: int) -> int:
    """Return the largest number of images, at most ``most``, that are the last whole groups.

    >>> whole_groups(np.array([1, 2, 2, 2, 0, 0]), 4)
    2
    """
    sizes = len(groups) - np.append(group_starts(groups), len(groups))
    return int(sizes[sizes <= most].max())


def folds_of(groups: np.ndarray, n_folds: int) -> np.ndarray:
    """Return the fold of each image (n,), int64: whole groups, about as many of them in each.

    ``groups`` (n,) follow each other. If there are fewer than ``n_folds``, each is a fold.

    >>> folds_of(np.array([1, 2, 2, 2, 0, 0]), 2).tolist()
    [0, 0, 0, 0, 1, 1]
    """
    starts = group_starts(groups)
    sizes = np.diff(np.append(starts, len(groups)))
    n = min(n_folds, len(starts))
    return np.repeat(np.arange(len(starts)) * n // max(1, len(starts)), sizes)
