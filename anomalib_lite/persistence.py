"""One safetensors file for each fitted detector: arrays and JSON, nothing that can run."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

import anomalib_lite
from anomalib_lite._adapter import Adapter
from anomalib_lite._model_file import serialize, write
from anomalib_lite._validation import closest
from anomalib_lite.detectors.base import Answers, BaseDetector
from anomalib_lite.detectors.cascade_fitting import open_gate
from anomalib_lite.detectors.cascade_state import get_state, plain_parameters, restore_cascade
from anomalib_lite.detectors.gated_cascade import GatedCascade
from anomalib_lite.detectors.mahalanobis_vfm import MahalanobisVFM
from anomalib_lite.detectors.padim import PaDiM
from anomalib_lite.detectors.patchcore import PatchCore
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import (
    InvalidValueError,
    MissingPathError,
    ModelFileError,
    NotFittedError,
)

__all__ = ["FORMAT_VERSION", "load", "save"]

FORMAT_VERSION = 1

DETECTORS: dict[str, type[BaseDetector] | type[GatedCascade]] = {
    "GatedCascade": GatedCascade,
    "MahalanobisVFM": MahalanobisVFM,
    "PaDiM": PaDiM,
    "PatchCore": PatchCore,
}

_KEY = "anomalib_lite"  # of our JSON among the file's metadata
_BACKBONE = "backbone."  # prefix of the backbone's tensors, where they are included
_WEIGHT = re.compile(r"(gate\.|detector\.)?backbone\.")  # also of the parts of a cascade
_ADAPTER = "adapter."  # and of what LoRA has learned


def save(
    detector: Answers,
    path: str | os.PathLike[str],
    *,
    include_backbone: bool = False,
) -> None:
    """Write a fitted detector; the same as ``detector.save(path)``.

    Parameters
    ----------
    detector : BaseDetector or GatedCascade
        Fitted.
    path : str or Path
        Written under another name beside its place, then renamed over it.
    include_backbone : bool, default=False
        Whether the backbone's weights go into the file. Those of a gate that was tuned always do.

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
    adapter begin with ``adapter.``. A cascade has the header of each of its detectors under
    ``parts``, and their tensors after ``detector.`` and ``gate.``.

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
    tensors, header = _describe(detector, include_backbone)
    write(serialize(tensors, {_KEY: json.dumps(header)}), Path(path), name)


def _describe(detector: Any, include_backbone: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file has of a detector: tensors by name, and JSON."""
    name, parts = type(detector).__name__, {}
    parameters, with_weights = detector.get_params(False), include_backbone
    if isinstance(detector, GatedCascade):
        with_weights |= bool(detector.gate_.history)  # tuned weights exist nowhere else
        arrays, state = get_state(detector)
        backbone: AnyBackbone | None = detector.gate_.backbone
        parts = {"detector": detector.detector_, "gate": detector.gate_.detector}
        parameters = plain_parameters(detector)
    else:
        arrays, state = detector._get_state()
        arrays["calibration_scores"] = detector.calibration_scores_
        backbone = getattr(detector, "backbone_", None)
    tensors: dict[str, Any] = {key: np.ascontiguousarray(a) for key, a in arrays.items()}
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "library_version": anomalib_lite.__version__,
        "detector": name,
        "parameters": {k: _to_json(k, v, name) for k, v in parameters.items()},
        "backbone": None,
        "state": {"threshold": float(detector.threshold_), **state},
    }
    if hasattr(detector, "skipped_"):
        header["state"]["skipped"] = detector.skipped_
    if backbone is not None:
        names = ("layers", "stride", "mean", "std", "engine", "sha256")
        header["backbone"] = {key: getattr(backbone, key) for key in names}
        header["backbone"]["dtype"] = str(backbone.dtype).removeprefix("torch.")
        if backbone.adapter is not None:
            factors, header["backbone"]["adapter"] = backbone.adapter.to_arrays()
            tensors |= {_ADAPTER + k: v for k, v in factors.items()}
        if with_weights:
            tensors |= {_BACKBONE + k: v for k, v in backbone.original_state().items()}
    for part, fitted in parts.items():
        if fitted is not None:
            own, header.setdefault("parts", {})[part] = _describe(fitted, include_backbone)
            tensors |= {f"{part}.{key}": tensor for key, tensor in own.items()}
    return tensors, header


def load(
    path: str | os.PathLike[str],
    *,
    backbone: Any = None,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> Any:
    """Read a detector that :meth:`~anomalib_lite.detectors.base.Answers.save` wrote.

    Parameters
    ----------
    path : str or Path
    backbone : torch.nn.Module, optional
        The module, if the detector was fitted with one of yours.
    weights : str or Path, optional
        Where the weights file of the backbone lies here, if not where it lay when fitted. Of a
        cascade whose parts have several, both may be dicts with keys "gate" and "detector".
    device : str, optional
        Where to run here, if not as when fitted.

    Returns
    -------
    BaseDetector or GatedCascade
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
    for name, given in (("backbone", backbone), ("weights", weights)):
        if isinstance(given, Mapping) and not given.keys() <= {"gate", "detector"}:
            raise InvalidValueError(
                f"load: {name} may be a dict with the keys 'gate' and 'detector', for the parts of "
                f"a cascade, got the keys {list(given)}."
            )
    arrays, header = _read(path)
    return _restore(arrays, header, path, backbone, weights, device)


def _restore(
    arrays: dict[str, Any],
    header: dict[str, Any],
    path: Path,
    backbone: Any,
    weights: Any,
    device: str | None,
) -> Any:
    """The detector that :func:`_describe` took apart."""
    parts = {}
    for name, part in dict(header.get("parts") or {}).items():
        own = _under(f"{name}.", arrays)
        network, file = (_for_part(name, value, part) for value in (backbone, weights))
        parts[name] = _restore(own, part, path, network, file, device)
    try:
        cls = DETECTORS[header["detector"]]
        parameters, state, fitted_with = (
            header["parameters"],
            header["state"],
            header["backbone"],
        )
        key = "gate" if cls is GatedCascade else "backbone"
        if cls is GatedCascade:
            backbone, weights = (_for_part("gate", value, header) for value in (backbone, weights))
            if fitted_with is None:  # what was given is for the detector that is the gate
                backbone = weights = None
        if backbone is not None:
            parameters[key] = backbone
        if weights is not None:
            parameters["weights"] = str(weights)
        if device is not None:
            parameters["device"] = device
        if cls is GatedCascade:
            detector: Any = restore_cascade(parameters, arrays, state, parts)
        else:
            detector = cls(**parameters)
            detector.calibration_scores_ = arrays["calibration_scores"]
            detector._set_state(arrays, state)
        detector.threshold_ = float(state["threshold"])
        if "skipped" in state:
            detector.skipped_ = [tuple(entry) for entry in state["skipped"]]
        if fitted_with is None:
            return detector
        layers, sha256 = list(fitted_with["layers"]), str(fitted_with["sha256"])
        adapter = fitted_with.get("adapter") and Adapter.from_arrays(
            _under(_ADAPTER, arrays), fitted_with["adapter"]
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
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
        if not included or getattr(detector, key) is None:
            raise
        raise ModelFileError(f"load: {path} is broken: {error}") from error
    _check_same(network, fitted_with, path)
    if cls is GatedCascade:
        detector.gate_.backbone = network
    else:
        detector._take_backbone(network)
    return detector


def _for_part(name: str, given: Any, header: dict[str, Any]) -> Any:
    """Of what was given to load a cascade, what is for one of its parts."""
    if isinstance(given, Mapping):
        return given.get(name)
    parameters = header.get("parameters", {})
    if isinstance(given, str | os.PathLike):  # a weights file
        return given if parameters.get("weights") is not None else None
    own = parameters.get("gate" if header.get("detector") == "GatedCascade" else "backbone")
    return given if own is None else None


def _check_same(network: AnyBackbone, fitted_with: dict[str, Any], path: Path) -> None:
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


def _under(prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _open_backbone(
    detector: Any,
    layers: list[str],
    sha256: str,
    included: dict[str, Any],
    adapter: Adapter | None,
    path: Path,
) -> AnyBackbone:
    is_cascade = isinstance(detector, GatedCascade)
    given = detector.gate if is_cascade else detector.backbone
    if given is None:
        raise InvalidValueError(
            f"load: {path} was fitted with a module of your own. Pass it: "
            "load(path, backbone=module)."
        )
    open_it = partial(open_gate, detector) if is_cascade else detector._open_backbone
    network: AnyBackbone = open_it(
        weights=None if _is_of_torch(given, "nn.Module") else detector.weights,
        # As fitted, whatever this version of timm would choose.
        layers=layers or None,
        adapter=adapter,
        state=included or None,
        # Weights in the file must prove that they are what the header says.
        sha256=None if included else sha256,
        where="load",
    )
    return network


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
            arrays = {k: file.get_tensor(k) for k in names if not _WEIGHT.match(k)}
        if any(a.dtype.isbuiltin != 1 for a in arrays.values()):  # such as another's bfloat16
            raise TypeError("a number type that numpy does not have")
        if len(arrays) < len(names):
            with safe_open(path, "pt") as file:
                arrays |= {k: file.get_tensor(k) for k in names if _WEIGHT.match(k)}
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
