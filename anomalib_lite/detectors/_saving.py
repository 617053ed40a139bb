"""A fitted detector -> one file, and back."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np

from anomalib_lite.detectors._fitted_parameters import FittedParameters
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import NotFittedError
from anomalib_lite.model_file import VERSIONS, describe_backbone, to_json, write_model

__all__ = ["SavedDetector"]


class SavedDetector(FittedParameters, ABC):
    """Methods that write a detector into a file, and restore it from one."""

    threshold_: float
    skipped_: list[tuple[str, str]]

    def save(self, path: str | os.PathLike[str], *, include_backbone: bool = False) -> None:
        """Write everything that scoring needs into one safetensors file.

        Parameters
        ----------
        path : str or Path
            The file is written under another name beside it, then renamed: after a crash an older
            file is still whole.
        include_backbone : bool, default=False
            Put the weights of the backbone (both backbones of a cascade) into the file too, so
            that it can be loaded without a network and without a weights file.

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        InvalidValueError
            If a parameter is an object that JSON cannot hold, such as a ``RandomState``, or is not
            what it was in :meth:`fit`.
        OutputError
            If the file cannot be written.

        Notes
        -----
        The file is a safetensors file. Its metadata have one key, ``anomalib_lite``, which holds
        JSON: ``format_version``, ``library_version``, ``detector`` (class name), ``parameters``
        (every constructor argument), ``backbone`` (layers, stride, mean and deviation of the
        pixels, number type, engine, SHA-256 of the weights, and ``adapter`` if there is one; null
        after ``fit_embeddings``) and ``state`` (``threshold``, ``calibration``, which is
        ``calibration_``, if the parameter is another, ``calibrated_threshold`` if that is another,
        ``calibration_names``,
        ``image_size``, which is ``image_size_``, if the parameter is another,
        ``pixel_threshold``, and the rest). Its tensors are
        ``calibration_scores`` and ``calibration_peaks`` (n,), ``calibration_groups`` (n,) if some
        are of one part, ``map_statistics`` (2, 3) for ``image_score="structure"``, and
        the detector's arrays: for PatchCore ``embeddings`` (M, D)
        float32, and ``index``, the bytes of a trained FAISS index, unless it is ``"flat"``
        (with ``position_window`` also ``positions`` (M,) and ``reach`` (h, w), int32; with
        ``foreground`` also ``foreground`` (D + 1,), float32); for
        PaDiM ``mean`` (P, d) and ``factors`` (P, d (d + 1) / 2), float32, and ``components``; for
        MahalanobisVFM ``patches.mean`` and ``images.mean`` (d,), and likewise ``scatter`` (d, d)
        and ``cubic`` (d,), float64; for SubspaceAD ``mean`` (D,) and ``scatter``
        (D (D + 1) / 2,), float64. A map of the embeddings has ``transform.0.scale``,
        ``transform.0.mean`` (D,) and ``transform.0.components`` (D, d), float32, and one more
        number for each further layer with ``fusion="per_layer"``; names of the detector's arrays
        then begin with ``layer0.`` and so on. A mask that :meth:`fit` was given for all images is
        ``ignore_mask`` (H, W), uint8; polygons are ``ignore_polygons`` in ``state``. Names of an
        adapter's tensors begin with ``adapter.``, those of a backbone's weights with
        ``backbone.``.

        A cascade has the header of each of its members under ``parts``, and names of their tensors
        begin with ``detector.`` and ``gate.``. Its own tensors are ``gate_weights`` and the like,
        and what the thresholds are computed from: ``calibration_probabilities``,
        ``calibration_detector_scores``, ``anomaly_probabilities`` and
        ``anomaly_detector_scores``, float64. The weights of a finetuned gate are always in the
        file. A router has its products there as ``product0`` and so on, without backbones. Its own
        tensors are ``known0`` and ``held_back0`` (n, D) float32 and so on: the mean patch embedding
        of each image of a product, for its mean and for its threshold.

        Examples
        --------
        See :func:`~anomalib_lite.load`.
        """
        name = type(self).__name__
        if not hasattr(self, "threshold_"):
            raise NotFittedError(f"{name}: not fitted yet. Call fit(images) before save.")
        self._refuse_changes()
        write_model(path, *self._describe(include_backbone), name)

    @abstractmethod
    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what a file must hold beside the parameters and the threshold: arrays, JSON."""

    def _learner(self) -> Any:
        """Return what holds the state: this detector, or the models of its layers."""
        return self

    def _restore_learner(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Become fitted, but for the threshold; ValueError if something does not fit."""
        self._set_state(arrays, state)

    @abstractmethod
    def _fitted_backbone(self) -> AnyBackbone | None:
        """Return the backbone that this detector was fitted with, without those of its members."""

    def _members(self) -> dict[str, Any]:
        """Return the fitted detectors inside this one by name; each has options of its own."""
        return {}

    def _describe(self, include_backbone: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what a file holds of this detector: tensors by name, and the header as JSON."""
        name = type(self).__name__
        arrays, state = self._learner()._get_state()
        tensors: dict[str, Any] = dict(arrays)
        header: dict[str, Any] = {
            **VERSIONS,
            "detector": name,
            "parameters": {k: to_json(k, v, name) for k, v in self._plain_parameters().items()},
            "backbone": None,
            "state": {"threshold": float(self.threshold_), **state},
        }
        if hasattr(self, "skipped_"):
            header["state"]["skipped"] = self.skipped_
        backbone = self._fitted_backbone()
        if backbone is not None:
            with_weights = include_backbone or self._weights_exist_here_alone()
            more, header["backbone"] = describe_backbone(backbone, with_weights)
            tensors |= more
        for member, fitted in self._members().items():
            own, header.setdefault("parts", {})[member] = fitted._describe(include_backbone)
            tensors |= {f"{member}.{key}": tensor for key, tensor in own.items()}
        return tensors, header

    def _weights_exist_here_alone(self) -> bool:
        """Tell whether the backbone's weights must be saved because they exist nowhere else."""
        return False

    def _plain_parameters(self) -> dict[str, Any]:
        """Return the constructor's arguments without those that the members describe."""
        parameters: dict[str, Any] = self.get_params(deep=False)  # type: ignore[attr-defined]
        return parameters

    @classmethod
    def _restore(
        cls,
        parameters: dict[str, Any],
        arrays: dict[str, np.ndarray],
        state: dict[str, Any],
        members: dict[str, Any],
    ) -> Self:
        """Return the detector that :meth:`_describe` took apart, but for its backbone.

        KeyError, TypeError or ValueError if something is missing or does not fit.
        """
        detector = cls(**parameters)
        detector._restore_learner(arrays, state)
        detector.threshold_ = float(state["threshold"])
        if "skipped" in state:
            detector.skipped_ = [tuple(entry) for entry in state["skipped"]]
        return detector

    @abstractmethod
    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Become fitted from what :meth:`_get_state` gave; ValueError if it does not fit."""
