"""Training and validation of one epoch -> the best of many epochs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = ["early_best"]

_Learned = TypeVar("_Learned")


def early_best(
    epochs: int,
    train: Callable[[int], float],
    validate: Callable[[], dict[str, float]],
    snapshot: Callable[[], _Learned],
    *,
    rank: Callable[[dict[str, float]], Any],
    patience: int | None = None,
    description: str,
    verbose: int = 0,
) -> tuple[_Learned, list[dict[str, float]]]:
    """Train epoch by epoch, and keep what was best on the validation images.

    Parameters
    ----------
    epochs : int
        Largest number of epochs.
    train : callable
        Trains one epoch, of which it is given the number, from 1 on; returns the mean loss.
    validate : callable
        Returns figures on the validation images.
    snapshot : callable
        Returns a copy of what is learned so far.
    rank : callable
        Turns the figures of an epoch into something that is larger for a better epoch.
    patience : int, optional
        Number of epochs without a better one after which training ends.
    description : str
        Title of the progress bar.
    verbose : int, default=0
        Above 0, a progress bar in a terminal.

    Returns
    -------
    learned
        Snapshot of the best epoch, the first of equal ones; that from before the training, if
        none is better.
    history : list of dict
        Figures from before the training, then those of each epoch, with its ``train_loss``.

    Examples
    --------
    >>> weights = [0]
    >>> def train(epoch):
    ...     weights[0] += 2
    ...     return 1 / epoch
    >>> early_best(
    ...     3, train, lambda: {"error": abs(weights[0] - 5)}, lambda: weights[0],
    ...     rank=lambda figures: -figures["error"], description="example",
    ... )[0]
    4
    """
    history = [validate()]
    best, best_epoch, kept = rank(history[0]), 0, snapshot()
    quiet = None if verbose else True  # None: in a terminal only
    for epoch in tqdm(range(1, epochs + 1), description, unit="epoch", leave=False, disable=quiet):
        history.append({"train_loss": train(epoch), **validate()})
        reached = rank(history[-1])
        if reached > best:
            best, best_epoch, kept = reached, epoch, snapshot()
        elif patience is not None and epoch - best_epoch >= patience:
            break
    return kept, history
