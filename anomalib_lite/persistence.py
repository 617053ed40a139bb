"""One safetensors file for each fitted detector: arrays and JSON, nothing that can run."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

import anomalib_lite
from anomalib_lite._adapter import Adapter
from anomalib_lite._validation import closest
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.detectors.mahalanobis_vfm import MahalanobisVFM
from anomalib_lite.detectors.padim import PaDiM
from anomalib_lite.detectors.patchcore import PatchCore
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import (
    InvalidValueError,
    MissingPathError,
    ModelFileError,
    NotFittedError,
    OutputError,
)

__all__ = ["FORMAT_VERSION", "load", "save"]

FORMAT_VERSION = 1

DETECTORS: dict[str, type[BaseDetector]] = {
    "MahalanobisVFM": MahalanobisVFM,
    "PaDiM": PaDiM,
    "PatchCore": PatchCore,
}

_KEY = "anomalib_lite"  # of our JSON among the file's metadata
_BACKBONE = "backbone."  # prefix of the backbone's tensors, where they are included
_ADAPTER = "adapter."  # and of what LoRA has learned


def save(
    detector: BaseDetector, path: str | os.PathLike[str], *, include_backbone: bool = False
) -> None:
    """Write a fitted detector; the same as ``detector.save(path)``.

    Parameters
    ----------
    detector : BaseDetector
        Fitted.
    path : str or Path
        Written under another name beside its place, then renamed over it.
    include_backbone : bool, default=False
        Whether the backbone's weights go into the file.

    Raises
    ------
    NotFittedError
        If the detector is not fitted.
    InvalidValueError
        If a parameter is an object that JSON cannot hold, such as a ``RandomState``.
    OutputError
        If the file cannot be written.

    Notes
    -----
    The file is a safetensors file. Its metadata have one key, ``anomalib_lite``, which holds
    JSON: ``format_version``, ``library_version``, ``detector`` (class name), ``parameters``
    (every constructor argument), ``backbone`` (layers, stride, mean and deviation of the pixels,
    number type, engine, SHA-256 of the weights, and ``adapter`` if there is one; null after
    ``fit_embeddings``) and ``state`` (threshold and the rest). Its tensors are
    ``calibration_scores`` (n,) and the detector's arrays: for PatchCore ``embeddings`` (M, D)
    float32, and ``index``, the bytes of a trained FAISS index, unless it is ``"flat"``; for PaDiM
    ``mean`` (P, d) and ``factors`` (P, d (d + 1) / 2), float32, and ``components``; those of an
    adapter begin with ``adapter.``.

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
    name = type(detector).__name__
    if not hasattr(detector, "threshold_"):
        raise NotFittedError(f"{name}: not fitted yet. Call fit(images) before save.")
    arrays, state = detector._get_state()
    arrays["calibration_scores"] = detector.calibration_scores_
    tensors: dict[str, Any] = {key: np.ascontiguousarray(a) for key, a in arrays.items()}
    backbone: AnyBackbone | None = getattr(detector, "backbone_", None)
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "library_version": anomalib_lite.__version__,
        "detector": name,
        "parameters": {k: _to_json(k, v, name) for k, v in detector.get_params(False).items()},
        "backbone": None,
        "state": {"threshold": float(detector.threshold_), **state},
    }
    if backbone is not None:
        header["backbone"] = {
            "layers": backbone.layers,
            "stride": backbone.stride,
            "mean": backbone.mean,
            "std": backbone.std,
            "dtype": detector.dtype_,
            "engine": detector.engine_,
            "sha256": backbone.sha256,
        }
        if backbone.adapter is not None:
            factors, header["backbone"]["adapter"] = backbone.adapter.to_arrays()
            tensors |= {_ADAPTER + k: v for k, v in factors.items()}
        header["state"]["skipped"] = detector.skipped_
        if include_backbone:
            tensors |= {_BACKBONE + k: v for k, v in backbone.original_state().items()}
    _write(_serialize(tensors, {_KEY: json.dumps(header)}), Path(path), name)


def load(
    path: str | os.PathLike[str],
    *,
    backbone: Any = None,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> Any:
    """Read a detector that :meth:`~anomalib_lite.detectors.base.BaseDetector.save` wrote.

    Parameters
    ----------
    path : str or Path
    backbone : torch.nn.Module, optional
        The module, if the detector was fitted with one of yours.
    weights : str or Path, optional
        Where the weights file of the backbone lies here, if not where it lay when fitted.
    device : str, optional
        Where to run here, if not as when fitted.

    Returns
    -------
    BaseDetector
        Fitted; on the same machine its scores and maps are equal to the bit.

    Raises
    ------
    MissingPathError
        If the file does not exist.
    ModelFileError
        If it is cut short, not ours, of a newer format, or was fitted with other weights than
        those found here.
    InvalidValueError
        If the backbone's weights cannot be had here.

    Notes
    -----
    Nothing in the file is executed, and no network is used for the embedded backbone, a
    ``weights`` file, a module, or a file saved with ``include_backbone=True``.

    Examples
    --------
    See :func:`save`.
    """
    path = Path(path)
    arrays, header = _read(path)
    try:
        cls = DETECTORS[header["detector"]]
        parameters, state, fitted_with = (
            header["parameters"],
            header["state"],
            header["backbone"],
        )
        if backbone is not None:
            parameters["backbone"] = backbone
        if weights is not None:
            parameters["weights"] = str(weights)
        if device is not None:
            parameters["device"] = device
        detector = cls(**parameters)
        detector.threshold_ = float(state["threshold"])
        detector.calibration_scores_ = arrays["calibration_scores"]
        detector._set_state(arrays, state)
        if fitted_with is None:
            return detector
        detector.skipped_ = [tuple(entry) for entry in state["skipped"]]
        layers, sha256 = list(fitted_with["layers"]), str(fitted_with["sha256"])
        adapter = fitted_with.get("adapter") and Adapter.from_arrays(
            _under(_ADAPTER, arrays), fitted_with["adapter"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"load: {path} does not describe a detector this version knows "
            f"({type(error).__name__}: {error}).{closest(header.get('detector'), DETECTORS)} "
            f"It was written by version {header.get('library_version')} of anomalib-lite; this is "
            f"{anomalib_lite.__version__}."
        ) from error
    included = _under(_BACKBONE, arrays)
    try:
        network = _open_backbone(detector, layers, sha256, included, adapter, path)
    except InvalidValueError as error:
        if not included or detector.backbone is None:
            raise
        raise ModelFileError(f"load: {path} is broken: {error}") from error
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
    detector._take_backbone(network)
    return detector


def _under(prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _open_backbone(
    detector: BaseDetector,
    layers: list[str],
    sha256: str,
    included: dict[str, Any],
    adapter: Adapter | None,
    path: Path,
) -> AnyBackbone:
    if detector.backbone is None:
        raise InvalidValueError(
            f"load: {path} was fitted with a module of your own. Pass it: "
            "load(path, backbone=module)."
        )
    return detector._open_backbone(
        weights=None if _is_of_torch(detector.backbone, "nn.Module") else detector.weights,
        # As fitted, whatever this version of timm would choose.
        layers=layers or None,
        adapter=adapter,
        state=included or None,
        # Weights in the file must prove that they are what the header says.
        sha256=None if included else sha256,
        where="load",
    )


def _is_of_torch(value: object, name: str) -> bool:
    """Whether a value is one of torch's, without importing torch for those that are not."""
    kind: Any = sys.modules.get("torch")
    for part in name.split("."):
        kind = getattr(kind, part, None)
    return kind is not None and isinstance(value, kind)


def _to_json(name: str, value: object, where: str) -> object:
    if _is_of_torch(value, "nn.Module"):
        return None
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike) or _is_of_torch(value, "device"):
        return str(value)
    if isinstance(value, list | tuple):
        return [_to_json(name, v, where) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InvalidValueError(
        f"{where}: {name}={value!r} cannot be saved; expected a number, a string, None or a list "
        f"of these. Fit with a plain {name} first."
    )


def _serialize(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
    if not any(key.startswith(_BACKBONE) for key in tensors):
        from safetensors.numpy import save as save_arrays

        return save_arrays(tensors, metadata)
    import torch  # weights may be of types that numpy does not have
    from safetensors.torch import save as save_tensors

    return save_tensors({key: torch.as_tensor(t) for key, t in tensors.items()}, metadata)


def _write(content: bytes, path: Path, where: str) -> None:
    # Beside its place: renaming is atomic only within one file system.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"{where}: cannot write {path}: {error}. Choose a directory that exists and can be "
            "written to."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if path.is_dir():
        raise MissingPathError(f"load: {path} is a directory. Give the model file that fit wrote.")
    if not path.is_file():
        raise MissingPathError(f"load: model file {path} does not exist.")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata.get(_KEY, "null"))
            names = list(file.keys())
            arrays = {k: file.get_tensor(k) for k in names if not k.startswith(_BACKBONE)}
        if any(a.dtype.isbuiltin != 1 for a in arrays.values()):  # such as another's bfloat16
            raise TypeError("a number type that numpy does not have")
        if len(arrays) < len(names):
            with safe_open(path, "pt") as file:
                arrays |= {k: file.get_tensor(k) for k in names if k.startswith(_BACKBONE)}
    except (SafetensorError, json.JSONDecodeError, OSError, TypeError) as error:
        raise ModelFileError(
            f"load: {path} is cut short or not a model file ({error}). Copy it again from where "
            "it was saved."
        ) from error
    if not isinstance(header, dict) or not isinstance(header.get("format_version"), int):
        raise ModelFileError(
            f"load: {path} is a safetensors file, but not one that anomalib-lite wrote. Expected "
            "a file from detector.save(path)."
        )
    if header["format_version"] > FORMAT_VERSION:
        raise ModelFileError(
            f"load: {path} has format version {header['format_version']}; this version of "
            f"anomalib-lite ({anomalib_lite.__version__}) reads up to {FORMAT_VERSION}. Upgrade "
            "with: pip install --upgrade anomalib-lite"
        )
    return arrays, header
