"""load: a model file -> the detector in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib_lite._validation import closest
from anomalib_lite._version import __version__
from anomalib_lite.cascade import GatedCascade, ProductRouter
from anomalib_lite.detectors import DetectorMixin, MahalanobisVFM, PaDiM, PatchCore, SubspaceAD
from anomalib_lite.errors import InvalidValueError, ModelFileError
from anomalib_lite.model_file import (
    ADAPTER,
    BACKBONE,
    FORMAT_VERSION,
    is_of_torch,
    read_model,
    select,
)
from anomalib_lite.networks.adapter import Adapter

__all__ = ["FORMAT_VERSION", "load"]

DETECTORS: dict[str, type[DetectorMixin]] = {
    cls.__name__: cls
    for cls in (GatedCascade, MahalanobisVFM, PaDiM, PatchCore, ProductRouter, SubspaceAD)
}


def load(
    path: str | os.PathLike[str],
    *,
    backbone: Any = None,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> Any:
    """Read a detector that :meth:`~anomalib_lite.detectors.DetectorMixin.save` wrote.

    Parameters
    ----------
    path : str or Path
    backbone : torch.nn.Module, optional
        The module, if the detector was fitted with one of yours.
    weights : str or Path, optional
        Weights file of the backbone, if it is no longer where it was at fit. For a cascade with
        several modules or files, both arguments may be dicts with keys "gate" and "detector".
    device : str, optional
        Device to run on, if not that of fit.

    Returns
    -------
    BaseDetector, GatedCascade or ProductRouter
        Fitted; on the same machine its scores and maps are equal to the bit.

    Raises
    ------
    MissingPathError
        If the file does not exist.
    ModelFileError
        If the file is cut short, of another kind, of a newer format, or was fitted with other
        weights than those found here.
    InvalidValueError
        If the backbone's weights cannot be found or downloaded.

    Notes
    -----
    Nothing in the file is executed, and no network is used for the embedded backbone, a
    ``weights`` file, a module, or a file saved with ``include_backbone=True``.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from pathlib import Path
    >>> from anomalib_lite import PatchCore, load
    >>> E = np.random.default_rng(0).normal(size=(9, 4, 6, 8)).astype("float32")
    >>> detector = PatchCore(false_alarm_rate=0.3).fit_embeddings(E)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     detector.save(Path(directory, "line3.safetensors"))
    ...     again = load(Path(directory, "line3.safetensors"))
    >>> bool((again.score_embeddings(E) == detector.score_embeddings(E)).all())
    True
    """
    path = Path(path)
    for name, given in (("backbone", backbone), ("weights", weights)):
        if isinstance(given, Mapping) and not given.keys() <= {"gate", "detector"}:
            raise InvalidValueError(
                f"load: {name} may be a dict with the keys 'gate' and 'detector', for the parts of "
                f"a cascade, got the keys {list(given)}."
            )
    tensors, header = read_model(path)
    return _restore(tensors, header, path, backbone, weights, device)


def _restore(
    tensors: dict[str, Any],
    header: dict[str, Any],
    path: Path,
    backbone: Any,
    weights: Any,
    device: str | None,
) -> DetectorMixin:
    """Restore a detector from its tensors and header; if it has members, these first."""
    members = {}
    for name, member in dict(header.get("parts") or {}).items():
        network, file = (_for_member(name, given, member) for given in (backbone, weights))
        members[name] = _restore(select(f"{name}.", tensors), member, path, network, file, device)
    try:
        cls = DETECTORS[header["detector"]]
        fitted_with = header["backbone"]
        if members:
            backbone, weights = (_for_member("gate", g, header) for g in (backbone, weights))
            if fitted_with is None:  # what was given is for the detector that is the gate
                backbone = weights = None
        given = {cls._network: backbone, "weights": weights and str(weights), "device": device}
        parameters = header["parameters"] | {k: v for k, v in given.items() if v is not None}
        detector = cls._restore(parameters, tensors, header["state"], members)
        detector._remember_parameters()
        opened = None if fitted_with is None else _backbone_options(fitted_with, tensors)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"load: {path} does not describe a detector this version knows "
            f"({type(error).__name__}: {error}).{closest(header.get('detector'), DETECTORS)} "
            f"It was written by version {header.get('library_version')} of anomalib-lite; this is "
            f"{__version__}."
        ) from error
    if opened is not None:
        _open_backbone(detector, opened, fitted_with, path)
    return detector


def _for_member(name: str, given: Any, header: dict[str, Any]) -> Any:
    """Select the argument of ``load`` that is for one member of a cascade, or None."""
    if isinstance(given, Mapping):
        return given.get(name)
    parameters = header.get("parameters", {})
    if isinstance(given, str | os.PathLike):  # a weights file
        return given if parameters.get("weights") is not None else None
    cls = DETECTORS.get(str(header.get("detector")), DetectorMixin)
    return given if parameters.get(cls._network) is None else None


def _backbone_options(fitted_with: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``open_backbone`` for the network that was used at fit."""
    included, sha256 = select(BACKBONE, tensors), str(fitted_with["sha256"])
    adapter = fitted_with.get("adapter")
    return {
        # Those of fit: this version of timm may choose others.
        "layers": list(fitted_with["layers"]) or None,
        "adapter": adapter and Adapter.from_arrays(select(ADAPTER, tensors), adapter),
        "state": included or None,
        # Without it, the hash of the weights in the file is computed, and compared below.
        "sha256": None if included else sha256,
    }


def _open_backbone(
    detector: Any, options: dict[str, Any], fitted_with: dict[str, Any], path: Path
) -> None:
    """Open the backbone of a restored detector, and check that it is that of fit."""
    given = getattr(detector, detector._network)
    if given is None:
        raise InvalidValueError(
            f"load: {path} was fitted with a module of your own. Pass it: "
            "load(path, backbone=module)."
        )
    weights = None if is_of_torch(given, "nn.Module") else detector.weights
    try:
        network = detector._open_backbone(weights=weights, **options, where="load")
    except InvalidValueError as error:
        if options["state"] is None:
            raise
        raise ModelFileError(f"load: {path} is broken: {error}") from error
    _check_same(network, fitted_with, path)
    detector._take_backbone(network)


def _check_same(network: Any, fitted_with: dict[str, Any], path: Path) -> None:
    """Raise if the opened backbone has other weights or preprocessing than that of fit."""
    sha256 = str(fitted_with["sha256"])
    if network.sha256 != sha256:
        raise ModelFileError(
            f"load: {path} was fitted with other backbone weights (SHA-256 {sha256[:12]}...) than "
            f"those found here ({network.sha256[:12]}...). Give the right file with "
            "load(path, weights=...), save with include_backbone=True, or fit again."
        )
    for key in ("mean", "std", "stride"):
        here, then = getattr(network, key), fitted_with.get(key)
        if then != here:
            raise ModelFileError(
                f"load: {path} was fitted with {key} {then} of the backbone, here it is {here}. "
                "Use the version of timm, or the module, that it was fitted with."
            )
