"""Embeddings on disk: what a frozen backbone said of an image is not computed twice.

Libraries that could do this, joblib.Memory and diskcache, keep Python's pickles, which may run code
when they are read; this package reads none. An entry is a plain ``.npy`` with its SHA-256 behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite._files import make_directory
from anomalib_lite._validation import check_memory
from anomalib_lite.engines import opening_backbones
from anomalib_lite.studies._provenance import processor, source_hash

__all__ = ["CachedBackbone", "FeatureCache"]

_SEAL = hashlib.sha256().digest_size  # bytes
# What is left after old entries are removed, so that this is not done at every write.
_LEFT = 0.9
# The process that began a temporary file so long ago is gone.
_UNFINISHED_S = 24 * 60 * 60
# Packages whose versions decide the bits of an embedding.
_DECIDING = ("torch", "timm", "openvino", "onnxruntime", "numpy")


class FeatureCache:
    """A directory of embeddings, bounded in size: those used longest ago are removed.

    Parameters
    ----------
    folder : path
        Made if it is not there. Several processes may share it.
    max_size : int or str, default="8GB"
        Largest size of all entries: bytes, or such as ``"500MB"``.

    Attributes
    ----------
    hits, misses : int
        Images whose embeddings were there, and those that were computed, by this object.

    Raises
    ------
    OutputError
        If the directory cannot be written to.
    InvalidValueError
        If ``max_size`` is no size.

    Notes
    -----
    An entry is one image: its key is the SHA-256 of its pixels at the network's input with all that
    decides the result: the weights' hash, adapter, layers, scales and attention, fusion, stride,
    device, number type, engine, the versions of the packages, the sources of this one, the
    processor, and the name of the GPU where one computes. Where a backbone computes several images
    at once (torch in a short number type, or on a GPU), results depend on the batch, and the key
    holds the hash of the whole batch too. So embeddings are the same to the bit with the cache and
    without. An entry that is broken is computed and written again.

    Examples
    --------
    >>> import tempfile
    >>> from anomalib_lite import PatchCore
    >>> images = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    >>> detector = PatchCore(image_size=64, false_alarm_rate=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = FeatureCache(folder)
    ...     with cache.active():
    ...         first = detector.fit(images).score(images)
    ...         again = detector.fit(images).score(images)
    >>> cache.hits, cache.misses, bool((first == again).all())
    (24, 8, True)
    """

    def __init__(self, folder: str | os.PathLike[str], max_size: int | str = "8GB") -> None:
        self.max_size = check_memory("max_size", max_size, "FeatureCache")
        self.folder = make_directory(Path(folder))
        self.hits = self.misses = 0
        self.is_active = True
        self._bytes = sum(size for _, size, _ in self._entries())

    def active(self) -> AbstractContextManager[None]:
        """Return a context in which all backbones that detectors open are wrapped."""
        return opening_backbones(lambda open_it, _: self.wrap(open_it()))

    def wrap(self, backbone: Any) -> CachedBackbone:
        """Return a backbone that looks here before it computes."""
        return CachedBackbone(backbone, self)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Compute everything in the block, as where times are measured; nothing is stored."""
        before, self.is_active = self.is_active, False
        try:
            yield
        finally:
            self.is_active = before

    def read(self, key: str) -> np.ndarray | None:
        """Return an entry; None if there is none, or it is broken."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            payload, seal = content[:-_SEAL], content[-_SEAL:]
            if hashlib.sha256(payload).digest() != seal:
                return None
            os.utime(path)  # used now
            return _from_npy(payload)
        except (OSError, ValueError):
            return None

    def write(self, key: str, embedding: np.ndarray) -> None:
        """Store an entry whole or not at all; if the disk is full, nothing happens."""
        payload = _to_npy(embedding)
        size = len(payload) + _SEAL
        if size > self.max_size:
            return
        path = self._path(key)
        # Not handed to the disk at once, as files of results are: the seal tells a torn entry.
        temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(payload + hashlib.sha256(payload).digest())
            temporary.replace(path)
            self._bytes += size
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if self._bytes > self.max_size:
            self._forget_oldest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npy"

    def _entries(self) -> list[tuple[int, int, Path]]:
        """Return (time of last use, size, path) of all entries, also those of other processes."""
        found = []
        for path in self.folder.glob("??/*.npy"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        return found

    def _forget_oldest(self) -> None:
        entries = sorted(self._entries())
        self._bytes = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if self._bytes <= self.max_size * _LEFT:
                break
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            self._bytes -= size
        for path in self.folder.glob("??/*.tmp"):  # of processes that were killed
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _UNFINISHED_S:
                    path.unlink()


class CachedBackbone:
    """A backbone whose embeddings come from a :class:`FeatureCache` if they are there.

    Everything but :meth:`embed` is that of the backbone. It can be pickled and copied.

    Parameters
    ----------
    backbone : Backbone or CompiledBackbone
    cache : FeatureCache

    Examples
    --------
    See :class:`FeatureCache`.
    """

    def __init__(self, backbone: Any, cache: FeatureCache) -> None:
        self.backbone, self.cache = backbone, cache
        self._identity = hashlib.sha256(
            json.dumps(_describe(backbone), sort_keys=True, default=str).encode()
        ).digest()

    def __getattr__(self, name: str) -> Any:
        if name == "backbone" or name.startswith("__"):  # while it is unpickled there is none yet
            raise AttributeError(name)
        return getattr(self.backbone, name)

    def __call__(self, pixels: Any) -> Any:
        """Return the feature maps, which are not cached."""
        return self.backbone(pixels)

    def embed(self, pixels: np.ndarray, channels: np.ndarray | None = None) -> np.ndarray:
        """Patch embeddings of a batch, as those of the backbone to the bit.

        Parameters
        ----------
        pixels : ndarray of shape (B, H, W, 3)
            uint8 in [0, 255], or float32 in [0, 1].
        channels : ndarray of shape (d,), int64, optional
            Positions of the wanted channels among the D; an entry always holds all.

        Returns
        -------
        ndarray of shape (B, h, w, D) or (B, h, w, d), float32
        """
        if not self.cache.is_active:
            found: np.ndarray = self.backbone.embed(pixels, channels)
            return found
        keys = self._keys(pixels)
        grids = [self.cache.read(key) for key in keys]
        absent = [i for i, grid in enumerate(grids) if grid is None]
        if absent and not _each_by_itself(self.backbone):
            absent = list(range(len(keys)))
        if absent:
            computed = self.backbone.embed(pixels[absent])
            for i, grid in zip(absent, computed, strict=True):
                self.cache.write(keys[i], grid)
                grids[i] = grid
        self.cache.misses += len(absent)
        self.cache.hits += len(keys) - len(absent)
        whole = np.stack([grid for grid in grids if grid is not None])
        return whole if channels is None else np.ascontiguousarray(whole[..., channels])

    def _keys(self, pixels: np.ndarray) -> list[str]:
        head = self._identity + repr((pixels.shape[1:], pixels.dtype.str)).encode()
        images = [hashlib.sha256(head + np.ascontiguousarray(p).tobytes()) for p in pixels]
        if not _each_by_itself(self.backbone):
            batch = hashlib.sha256(b"".join(image.digest() for image in images)).digest()
            for image in images:
                image.update(batch)
        return [image.hexdigest() for image in images]


def _each_by_itself(backbone: Any) -> bool:
    """Tell whether an image's embedding does not depend on the other images of its batch."""
    return bool(backbone.engine != "torch" or backbone.pixels_at_once == 1)


def _describe(backbone: Any) -> dict[str, Any]:
    """Return all that decides what a backbone computes, beside the pixels."""
    origin = getattr(getattr(backbone, "_origin", None), "arguments", {})
    adapter = backbone.adapter
    return {
        "weights": backbone.sha256,
        "adapter": None if adapter is None else adapter.sha256(),
        "layers": backbone.layers,
        "fusion": origin.get("fusion") or getattr(backbone, "fusion", None),
        "scales": getattr(backbone, "scales", None),
        "attention": getattr(backbone, "_attention", None) is not None,
        "stride": backbone.stride,
        "pixels": [backbone.mean, backbone.std],
        "device": backbone.device,
        "dtype": backbone.dtype,
        "engine": backbone.engine,
        "versions": {name: _version(name) for name in _DECIDING},
        "sources": source_hash("backbones", "engines", "fusion", "networks"),
        "processor": [processor(), platform.machine(), os.environ.get("ONEDNN_MAX_CPU_ISA")],
        "gpu": _gpu(str(backbone.device)),
    }


def _gpu(device: str) -> str | None:
    """Return the name of the GPU: others round otherwise. None for other devices."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_name(device)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _to_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _from_npy(payload: bytes) -> np.ndarray:
    return np.asarray(np.load(io.BytesIO(payload)))
