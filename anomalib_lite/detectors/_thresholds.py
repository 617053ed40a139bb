"""The threshold of a fitted detector: another rate, other good images, one of one's own."""

from __future__ import annotations

import math
import warnings
from typing import Any, Self

import numpy as np

from anomalib_lite._validation import check_groups, check_number, refuse_labelled
from anomalib_lite.calibration import threshold_and_shortfall
from anomalib_lite.detectors._fitted_parameters import FittedParameters
from anomalib_lite.errors import CalibrationWarning, InvalidValueError, NotFittedError
from anomalib_lite.images import ImageSource

__all__ = ["ThresholdMixin"]


class ThresholdMixin(FittedParameters):
    """Methods that set the threshold of a detector without a new fit."""

    threshold_: float
    calibrated_threshold_: float
    pixel_threshold_: float | None  # None in an older file, which did not hold it
    calibration_scores_: np.ndarray
    calibration_peaks_: np.ndarray
    calibration_groups_: np.ndarray
    calibration_names_: list[str]
    calibration: str
    calibration_: str
    false_alarm_rate: float
    false_alarm_confidence: float | None
    image_score: str

    def set_false_alarm_rate(
        self, false_alarm_rate: float, *, confidence: float | None = None
    ) -> Self:
        """Set the threshold for another rate, from the scores that the last one was taken from.

        Parameters
        ----------
        false_alarm_rate : float
            Share of future normal images that may be called anomalous, in (0, 1). Later calls of
            :meth:`partial_fit` go on with it.
        confidence : float, optional
            Probability, in (0, 1), that the rate of this very threshold is at most
            ``false_alarm_rate``; by default that of the detector, ``false_alarm_confidence``, which
            it replaces. See :func:`~anomalib_lite.calibration.conformal_threshold`.

        Returns
        -------
        BaseDetector
            Itself; after an error it is as before.

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        InvalidValueError
            For a rate or a confidence outside (0, 1), or for a confidence after a fit with
            ``calibration="cross"``.

        Warns
        -----
        CalibrationWarning
            If there are too few scores for the rate.

        Examples
        --------
        >>> from anomalib_lite import PatchCore
        >>> E = np.random.default_rng(0).normal(size=(100, 4, 4, 8)).astype("float32")
        >>> detector = PatchCore(false_alarm_rate=0.05).fit_embeddings(E)
        >>> before = detector.threshold_
        >>> detector.set_false_alarm_rate(0.2).threshold_ < before
        True
        """
        self._check_has_threshold()
        known = self.calibration_scores_, self.calibration_peaks_, self.calibration_groups_
        confidence = self.false_alarm_confidence if confidence is None else confidence
        names, way = self.calibration_names_, self.calibration_
        if confidence is not None and way == "cross":
            raise InvalidValueError(
                f"{type(self).__name__}: the scores of calibration='cross' depend on each other, "
                "so no confidence is known. Call recalibrate(images, confidence=...) on other good "
                "images, or fit with calibration='split'."
            )
        self._calibrate(*known, names, false_alarm_rate, confidence)
        self.calibration_ = way
        return self

    def recalibrate(
        self,
        images: Any,
        false_alarm_rate: float | None = None,
        *,
        confidence: float | None = None,
        ignore_mask: Any = None,
        groups: Any = None,
    ) -> Self:
        """Take the threshold from other normal images; the model itself does not change.

        For a line whose light or camera has changed a little, or to give a new product variant a
        threshold of its own.

        Parameters
        ----------
        images
            Normal images that the detector was not fitted on, in any form that :meth:`fit` takes.
            Their scores replace ``calibration_scores_``.
        false_alarm_rate : float, optional
            As in :meth:`set_false_alarm_rate`; by default the detector's.
        confidence : float, optional
            As in :meth:`set_false_alarm_rate`.
        ignore_mask : optional
            As in :meth:`detect`.
        groups : sequence of N whole numbers or strings, optional
            Group of each image, such as the part that it shows; see
            :func:`~anomalib_lite.calibration.conformal_threshold`.

        Returns
        -------
        BaseDetector
            Itself; after an error it is as before.

        Raises
        ------
        NotFittedError
            Before :meth:`fit`, and after ``fit_embeddings``, which fits no backbone.
        InvalidValueError
            As :meth:`set_false_alarm_rate`, before any image is scored; also if no image can be
            used, or for images that are labelled anomalous.
        AnomalibLiteError
            For an image that cannot be used, unless ``on_error="skip"``.

        Warns
        -----
        CalibrationWarning
            If there are too few images for the rate.

        Notes
        -----
        The guarantee is that of :func:`~anomalib_lite.calibration.conformal_threshold`, for future
        images that are exchangeable with these. Images that were fitted on score too low, and
        would give a threshold that is too low; so would copies of them.

        Examples
        --------
        >>> from anomalib_lite import PatchCore
        >>> rng = np.random.default_rng(0)
        >>> good = rng.integers(100, 140, (40, 64, 64, 3), dtype=np.uint8)
        >>> detector = PatchCore(image_size=64, false_alarm_rate=0.2).fit(good[:20])
        >>> len(detector.recalibrate(good[20:], 0.1).calibration_scores_)
        20
        """
        self._check_has_threshold()
        rate = self.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
        confidence = self.false_alarm_confidence if confidence is None else confidence
        self._check_calibration(rate, confidence)
        where = type(self).__name__
        refuse_labelled(images, where, "recalibrate takes normal images only.")
        ids = None
        if groups is not None:  # before any image is scored
            ids = check_groups(groups, len(ImageSource(images, where=where).items), where)
        detect: Any = self.detect  # type: ignore[attr-defined]
        found = detect(images, maps=np.max, ignore_mask=ignore_mask)
        return self._calibrate_on(found, ids, rate, confidence)

    def _calibrate_on(
        self, found: Any, groups: np.ndarray | None, rate: float, confidence: float | None
    ) -> Self:
        """Calibrate by detections whose maps are the largest values of the heatmaps alone."""
        groups = np.arange(len(found.scores)) if groups is None else groups
        peaks = np.array([np.nan if peak is None else peak for peak in found.maps], np.float32)
        return self._calibrate(found.scores, peaks, groups, found.names, rate, confidence)

    def _calibrate(
        self,
        scores: np.ndarray,
        peaks: np.ndarray,
        groups: np.ndarray,
        names: list[str],
        rate: float,
        confidence: float | None,
    ) -> Self:
        """Set the threshold from the scores of normal images; NaN is one that was skipped."""
        self._check_calibration(rate, confidence)
        usable = ~np.isnan(scores)
        scores, peaks, groups = scores[usable], peaks[usable], groups[usable]
        names = [name for name, use in zip(names, usable, strict=True) if use]
        if not len(scores):
            raise InvalidValueError(
                f"{type(self).__name__}: a threshold needs at least one image that can be used, "
                "got none. Give others."
            )
        threshold, shortfall = threshold_and_shortfall(scores, rate, confidence, groups)
        if shortfall is not None:
            warnings.warn(shortfall, CalibrationWarning, stacklevel=3)
        self.calibration_scores_, self.calibration_groups_ = scores, groups
        self.calibration_peaks_ = peaks
        self.calibration_names_, self.calibration_ = names, "split"  # of images not fitted on
        self.false_alarm_rate, self.false_alarm_confidence = float(rate), confidence
        self.threshold_ = self.calibrated_threshold_ = threshold
        self._remember_parameters()
        self.pixel_threshold_ = self._calibrated_pixels()
        return self

    def _calibrated_pixels(self) -> float | None:
        """Compute the threshold of the heatmaps as that of the scores, from their largest values.

        None if these are not known.
        """
        known = ~np.isnan(self.calibration_peaks_)
        if len(known) and not known.any():
            return None
        promise = self.false_alarm_rate, self.false_alarm_confidence
        groups = self.calibration_groups_[known]
        return threshold_and_shortfall(self.calibration_peaks_[known], *promise, groups)[0]

    def _own_pixel_threshold(self) -> float | None:
        """Return the ``pixel_threshold_`` that the user has set; None for that of a calibration."""
        known = getattr(self, "pixel_threshold_", None)
        return None if known is None or known == self._calibrated_pixels() else float(known)

    def _in_map_units(self, threshold: float) -> float | None:
        """Return the level of the heatmaps that belongs to a threshold of the scores.

        ``pixel_threshold_`` belongs to the calibrated one, and others are in proportion. None if it
        is not known, and heatmaps have other units than scores.
        """
        level = self.pixel_threshold_
        if level is None:
            return None if self.image_score == "structure" else threshold
        if threshold == self.calibrated_threshold_:
            return float(level)
        if not (math.isfinite(self.calibrated_threshold_) and self.calibrated_threshold_ > 0):
            return float(level) if self.image_score == "structure" else threshold
        return float(level) * threshold / self.calibrated_threshold_

    def _check_calibration(self, rate: float, confidence: float | None) -> None:
        """Raise InvalidValueError if no threshold can be set for this rate and confidence."""
        where = type(self).__name__
        check_number("false_alarm_rate", rate, where, "(0, 1)")
        if confidence is not None:
            check_number("confidence", confidence, where, "(0, 1)")

    def _take_threshold(self, calibrated: float) -> bool:
        """Set the threshold after a fit and return True, unless the user had set another."""
        known = getattr(self, "threshold_", calibrated)
        own = known != getattr(self, "calibrated_threshold_", known)
        self.calibrated_threshold_ = calibrated
        self.threshold_ = known if own else calibrated
        return not own

    def _check_has_threshold(self) -> None:
        if not hasattr(self, "threshold_"):
            raise NotFittedError(f"{type(self).__name__}: not fitted yet. Call fit(images) first.")
        self._refuse_changes("false_alarm_rate", "false_alarm_confidence")

    def _describe_threshold(self, tensors: dict[str, Any], header: dict[str, Any]) -> None:
        """Add to what a file holds what the threshold rests on."""
        if self.calibration_ != self.calibration:  # which is "auto", or was changed since
            header["state"]["calibration"] = self.calibration_
        tensors["calibration_scores"], groups = self.calibration_scores_, self.calibration_groups_
        if not np.isnan(self.calibration_peaks_).all():
            tensors["calibration_peaks"] = self.calibration_peaks_
        if self.pixel_threshold_ is not None:
            header["state"]["pixel_threshold"] = self.pixel_threshold_
        if len(np.unique(groups)) < len(groups):
            tensors["calibration_groups"] = groups
        if any(self.calibration_names_):
            header["state"]["calibration_names"] = self.calibration_names_
        if self.calibrated_threshold_ != self.threshold_:  # the user has set another
            header["state"]["calibrated_threshold"] = self.calibrated_threshold_

    def _restore_threshold(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Take it over from a file that the threshold itself was read from."""
        self.calibration_ = str(state.get("calibration", self.calibration))
        self.calibration_scores_ = scores = arrays["calibration_scores"]
        self.calibration_groups_ = arrays.get("calibration_groups", np.arange(len(scores)))
        # Older files have no peaks, and a threshold of the heatmaps for "structure" alone.
        self.calibration_peaks_ = arrays.get("calibration_peaks", np.full_like(scores, np.nan))
        for name in ("calibration_groups", "calibration_peaks"):
            if getattr(self, f"{name}_").shape != scores.shape:
                raise ValueError(f"{name} are not those of {len(scores)} scores")
        level = state.get("pixel_threshold", state.get("map_threshold"))
        self.pixel_threshold_ = None if level is None else float(level)
        self.calibration_names_ = [
            str(n) for n in state.get("calibration_names", [""] * len(scores))
        ]
        if len(self.calibration_names_) != len(scores):
            raise ValueError(f"calibration_names are not those of {len(scores)} scores")
        self.calibrated_threshold_ = float(state.get("calibrated_threshold", self.threshold_))
