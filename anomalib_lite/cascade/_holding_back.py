"""Labels and groups of images -> which images train, and which are held back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from anomalib_lite._validation import normal_indices, refuse_labelled
from anomalib_lite.calibration import calibration_size
from anomalib_lite.cascade.routing import min_anomalies
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.images import ImageSource

__all__ = ["Split", "Subset", "Subsets", "draw_split", "positions_by_class"]

_WHERE = "GatedCascade"
# Normal groups that a fit needs.
_FEWEST = 8


def positions_by_class(images: Any, y: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the normal and of the anomalous among ``n`` images."""
    normal = np.arange(n)
    if y is not None:
        normal = normal_indices(y, n, _WHERE)
    else:
        remedy = "Pass their labels, y=[sample.label for sample in samples]."
        refuse_labelled(images, _WHERE, remedy)
    return normal, np.setdiff1d(np.arange(n), normal)


@dataclass(frozen=True)
class Subset:
    """Some of the images, with their features (n, d) by the gate's encoder."""

    images: ImageSource
    features: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Subsets:
    """The images that can be used, by purpose; fields as in :class:`Split`."""

    head_normal: Subset
    head_anomalous: Subset
    calibration_normal: Subset
    detector_normal: Subset
    held_back_normal: Subset
    held_back_anomalous: Subset


@dataclass(frozen=True)
class Split:
    """Positions of images, by purpose.

    Attributes
    ----------
    encoder_normal : ndarray of int
        Normal images for the whitening, or for the detector that is the gate.
    head_normal, head_anomalous : ndarray of int
        Images for the gate's head, or for the finetuning of its network.
    calibration_normal : ndarray of int
        Normal images for the calibration of the gate's probability.
    detector_normal : ndarray of int
        Normal images for the heatmap model: all that train or calibrate the gate.
    held_back_normal : ndarray of int
        Normal images for the thresholds.
    held_back_anomalous : ndarray of int
        Labelled anomalies for the calibration and for ``t_low``; empty if they are too few.
    """

    encoder_normal: np.ndarray
    head_normal: np.ndarray
    head_anomalous: np.ndarray
    calibration_normal: np.ndarray
    detector_normal: np.ndarray
    held_back_normal: np.ndarray
    held_back_anomalous: np.ndarray

    def subsets(
        self, source: ImageSource, features: np.ndarray, skipped: list[tuple[int, str]]
    ) -> Subsets:
        """Give each image its features, without those that have none.

        Raises
        ------
        InvalidValueError
            If nothing is left where something is needed.
        """
        usable = np.isfinite(features).all(axis=1)

        def subset(positions: np.ndarray, *, needed: bool = True) -> Subset:
            left = positions[usable[positions]]
            if needed and not len(left):
                raise InvalidValueError(
                    f"{_WHERE}: too few of {len(source)} images could be used to learn from and "
                    f"to hold back; the first that could not: {skipped[0][1]}"
                )
            return Subset(source.take(left), features[left])

        return Subsets(
            head_normal=subset(self.head_normal),
            head_anomalous=subset(self.head_anomalous, needed=len(self.head_anomalous) > 0),
            calibration_normal=subset(self.calibration_normal),
            detector_normal=subset(self.detector_normal),
            held_back_normal=subset(self.held_back_normal),
            held_back_anomalous=subset(self.held_back_anomalous, needed=False),
        )


def draw_split(
    normal: np.ndarray,
    anomalous: np.ndarray,
    groups: np.ndarray,
    *,
    false_alarm_rate: float,
    max_missed: float,
    halve: bool,
    random: np.random.RandomState,
) -> Split:
    """Draw the purpose of each image, for whole groups at a time.

    Parameters
    ----------
    normal, anomalous : ndarray of int
        Positions of the images of each class.
    groups : ndarray of shape (N,), int
        Group of each image. Of each group held back one image is used, so that the images held
        back are exchangeable with the images of new groups.
    false_alarm_rate, max_missed : float
        As in :class:`~anomalib_lite.GatedCascade`; they determine how many are held back.
    halve : bool
        Whether the gate's head gets other images than its encoder. It must if the encoder is a
        detector: its scores of images that it was fitted on are too low.
    random : RandomState
    """
    order = random.permutation(np.unique(groups[normal]))
    n = len(order)
    if n < _FEWEST:
        raise InvalidValueError(
            f"{_WHERE}: fit needs at least {_FEWEST} normal images, of different parts if groups "
            f"are given, to learn from and to hold back, got {n}. Give more."
        )
    n_held_back = min(max(calibration_size(false_alarm_rate), n // 5), n // 2)
    n_train = n - n_held_back - (n - n_held_back) // 4
    anomalous_order = random.permutation(np.unique(groups[anomalous]))
    half = len(anomalous_order) // 2
    # If half of the labelled anomalies are too few for max_missed, all of them train.
    n_anomalous = len(anomalous_order) - (half if half >= min_anomalies(max_missed) else 0)
    train = _images_of(order[:n_train], normal, groups)
    calibration = _images_of(order[n_train : n - n_held_back], normal, groups)
    n_encoder = len(train) // 2 if halve else 0
    return Split(
        encoder_normal=train[:n_encoder] if halve else train,
        head_normal=np.sort(train[n_encoder:]),
        head_anomalous=_images_of(anomalous_order[:n_anomalous], anomalous, groups),
        calibration_normal=calibration,
        detector_normal=np.concatenate([train, calibration]),
        held_back_normal=_one_of_each(order[n - n_held_back :], normal, groups, random),
        held_back_anomalous=_one_of_each(anomalous_order[n_anomalous:], anomalous, groups, random),
    )


def _by_group(chosen: np.ndarray, positions: np.ndarray, groups: np.ndarray) -> list[np.ndarray]:
    """Return the positions of each chosen group's images."""
    ordered = positions[np.argsort(groups[positions], kind="stable")]
    starts, ends = (np.searchsorted(groups[ordered], chosen, side) for side in ("left", "right"))
    return [ordered[start:end] for start, end in zip(starts, ends, strict=True)]


def _images_of(chosen: np.ndarray, positions: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Select the images whose group is in ``chosen``, in its order."""
    return np.concatenate([np.empty(0, np.int64), *_by_group(chosen, positions, groups)])


def _one_of_each(
    chosen: np.ndarray, positions: np.ndarray, groups: np.ndarray, random: np.random.RandomState
) -> np.ndarray:
    """Draw one image of each group in ``chosen``, in its order."""
    drawn = [
        some[random.randint(len(some))] if len(some) > 1 else some[0]
        for some in _by_group(chosen, positions, groups)
    ]
    return np.array(drawn, np.int64)
