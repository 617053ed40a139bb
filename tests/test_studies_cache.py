"""The cache of embeddings: the same bits, a bound, and entries that are broken."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from anomalib_lite import PaDiM, PatchCore
from anomalib_lite.engines import open_backbone
from anomalib_lite.errors import InvalidValueError

for package in ("pandas", "pydantic", "yaml"):
    pytest.importorskip(package, reason="needs the extra benchmarks")

from anomalib_lite.studies import CachedBackbone, FeatureCache  # noqa: E402

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 64, 96, 3), dtype=np.uint8)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.npy"))


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("detector", [PatchCore, PaDiM])
def test_results_are_the_same_to_the_bit(engine: str, detector: type, tmp_path: Path) -> None:
    model = detector(image_size=(64, 96), engine=engine, false_alarm_rate=0.5)
    cache = FeatureCache(tmp_path)
    model.fit(PIXELS[:5])
    # In each order: the last bits of a product may depend on where in the batch a row stands.
    plain, backward = model.detect(PIXELS), model.detect(PIXELS[::-1])
    with cache.active():
        first = model.fit(PIXELS[:5]).detect(PIXELS)
        assert (cache.hits, cache.misses) == (5, 7)
        again = model.fit(PIXELS[:5]).detect(PIXELS[::-1])
    assert (cache.hits, cache.misses) == (17, 7)
    for found, expected in ((first, plain), (again, backward)):
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.maps, expected.maps)
    assert np.load(entries(tmp_path)[0]).ndim == 3  # an entry is a plain file of numpy


def test_what_depends_on_the_batch_is_kept_by_batch(tmp_path: Path) -> None:
    backbone = open_backbone("efficientnet_lite0", engine="torch", device="cpu", dtype="bfloat16")
    cached = FeatureCache(tmp_path).wrap(backbone)
    for batch in (PIXELS, PIXELS[:3], PIXELS[2:5]):
        for _ in range(2):
            np.testing.assert_array_equal(cached.embed(batch), backbone.embed(batch))
    assert len(entries(tmp_path)) == 7 + 3 + 3


def test_what_decides_an_embedding_is_in_its_key(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    plain = {"engine": "torch", "device": "cpu"}
    others = [{"layers": ["blocks.2"]}, {"fusion": "single"}, {"dtype": "bfloat16"}]
    others += [{"strides": (8,)}, {"scales": (0.5, 1.0)}]
    for number, more in enumerate([{}, *others], start=1):
        backbone = open_backbone("efficientnet_lite0", **(plain | more))
        found = cache.wrap(backbone).embed(PIXELS[:1])
        np.testing.assert_array_equal(found, backbone.embed(PIXELS[:1]))
        # strides=(8,) chooses the layer that one of the others names: the same embedding.
        assert len(entries(tmp_path)) == number - (number > 4)
    cache.wrap(open_backbone("efficientnet_lite0", **plain)).embed(PIXELS[:1] / np.float32(255))
    assert cache.misses == 6


def test_gpus_have_entries_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cache = FeatureCache(tmp_path)
    backbone = open_backbone("efficientnet_lite0", engine="torch", device="cpu")
    backbone.device = torch.device("cuda:0")  # nothing is computed there
    keys = []
    for name in ("one", "two", "one"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        keys.append(cache.wrap(backbone)._keys(PIXELS[:1]))
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("harm", ["truncated", "one bit", "empty", "a folder"])
def test_a_broken_entry_is_computed_again(harm: str, tmp_path: Path) -> None:
    backbone = open_backbone("efficientnet_lite0", engine="torch", device="cpu")
    cached = FeatureCache(tmp_path).wrap(backbone)
    right = cached.embed(PIXELS[:2])
    path = entries(tmp_path)[0]
    content = bytearray(path.read_bytes())
    if harm == "one bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "truncated" else b"")
    np.testing.assert_array_equal(cached.embed(PIXELS[:2]), right)
    assert cached.cache.misses == 3
    if harm != "a folder":
        np.testing.assert_array_equal(cached.embed(PIXELS[:2]), right)
        assert cached.cache.misses == 3  # it was mended


def test_the_size_is_bounded_and_what_was_used_last_stays(tmp_path: Path) -> None:
    backbone = open_backbone("efficientnet_lite0", engine="torch", device="cpu")
    one = FeatureCache(tmp_path / "one").wrap(backbone)
    one.embed(PIXELS[:1])
    size = entries(tmp_path / "one")[0].stat().st_size
    cache = FeatureCache(tmp_path / "many", max_size=int(4.5 * size))
    cached = cache.wrap(backbone)
    cached.embed(PIXELS[:3])
    left = entries(tmp_path / "many")[0].with_suffix(".0.tmp")  # by a process that was killed
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    cached.embed(PIXELS[:1])  # used again, and so younger than the other two
    cached.embed(PIXELS[3:7])
    paths = entries(tmp_path / "many")
    assert sum(path.stat().st_size for path in paths) <= 4.5 * size
    assert not left.exists()
    misses = cache.misses
    cached.embed(PIXELS[6:7])
    assert cache.misses == misses
    # Another process sees the same bound, and an entry above the bound is not written at all.
    small = FeatureCache(tmp_path / "many", max_size=size // 2).wrap(backbone)
    np.testing.assert_array_equal(small.embed(PIXELS[1:2]), backbone.embed(PIXELS[1:2]))
    with pytest.raises(InvalidValueError, match="max_size must be a number of bytes"):
        FeatureCache(tmp_path, "much")


def test_paused_it_neither_reads_nor_writes(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cached = cache.wrap(open_backbone("efficientnet_lite0", engine="torch", device="cpu"))
    with cache.paused():
        cached.embed(PIXELS[:1])
    assert (cache.hits, cache.misses, entries(tmp_path)) == (0, 0, [])


def test_a_wrapped_backbone_can_be_pickled_and_saved_with_its_detector(tmp_path: Path) -> None:
    from anomalib_lite import load

    cache = FeatureCache(tmp_path / "cache")
    with cache.active():
        detector = PatchCore(image_size=64, false_alarm_rate=0.5).fit(PIXELS)
    assert isinstance(detector.backbone_, CachedBackbone)
    copy = pickle.loads(pickle.dumps(detector.backbone_))
    np.testing.assert_array_equal(copy.embed(PIXELS), detector.backbone_.embed(PIXELS))
    detector.save(tmp_path / "model.safetensors")
    scores = load(tmp_path / "model.safetensors").score(PIXELS)
    np.testing.assert_array_equal(scores, detector.score(PIXELS))


def test_processes_of_n_jobs_give_the_same(tmp_path: Path) -> None:
    options = {"image_size": 64, "false_alarm_rate": 0.5}
    alone = PatchCore(**options).fit(PIXELS).score(PIXELS)
    with FeatureCache(tmp_path).active():
        together = PatchCore(**options, n_jobs=2).fit(PIXELS).score(PIXELS)
    np.testing.assert_array_equal(alone, together)
