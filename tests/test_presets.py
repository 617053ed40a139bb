"""Presets: parameters under a name."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import timm
import torch
from detector_fixtures import Small
from sklearn.base import clone

import anomalib_lite
from anomalib_lite import PatchCore
from anomalib_lite.detectors.presets import PRESETS
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.networks import NETWORKS

ALL = [(detector, name) for detector, presets in PRESETS.items() for name in presets]


def make(detector: str, name: str, **parameters: Any) -> Any:
    return getattr(anomalib_lite, detector).preset(name, **parameters)


@pytest.mark.parametrize(("detector", "name"), ALL)
def test_parameters_show_the_preset_and_pass_all_checks(detector: str, name: str) -> None:
    given = PRESETS[detector][name].parameters
    made = make(detector, name)
    shown = made.get_params()
    assert {key: shown[key] for key in given} == given
    defaults = inspect.signature(type(made)).parameters
    others = shown.keys() - given.keys()
    assert all(shown[key] == defaults[key].default for key in others)
    made._check_parameters()
    assert clone(made).get_params() == shown


@pytest.mark.parametrize(("detector", "name"), ALL)
def test_each_parameter_differs_from_the_default(detector: str, name: str) -> None:
    defaults = inspect.signature(getattr(anomalib_lite, detector)).parameters
    for key, value in PRESETS[detector][name].parameters.items():
        # Layers are named even where they are those that the default would choose.
        assert key == "layers" or defaults[key].default != value, key


@pytest.mark.parametrize(("detector", "name"), ALL)
def test_the_network_has_the_layers(detector: str, name: str) -> None:
    made = make(detector, name)
    if made.layers is None:
        assert made.backbone in NETWORKS
        return
    full = NETWORKS[made.backbone].timm if made.backbone in NETWORKS else made.backbone
    with torch.device("meta"):
        network = timm.create_model(full, pretrained=False)
    assert set(made.layers) <= {layer for layer, _ in network.named_modules()}


def test_a_given_parameter_has_precedence() -> None:
    detector = make("PatchCore", "paper", coreset_ratio=0.01, n_neighbors=1)
    assert (detector.coreset_ratio, detector.image_score) == (0.01, "reweighted")
    detector = make("PatchCore", "paper", coreset_size=2000)
    assert (detector.coreset_ratio, detector.coreset_size) == (None, 2000)


def test_a_subclass_has_the_presets_of_its_parent() -> None:
    class Own(PatchCore):
        pass

    assert type(Own.preset("fast")) is Own


@pytest.mark.parametrize("detector", ["PatchCore", "PaDiM"])
def test_an_unknown_name_is_refused_with_those_that_exist(detector: str) -> None:
    with pytest.raises(InvalidValueError, match=r"its presets \(.*'paper'.*\), got 'quick'"):
        make(detector, "quick")


@pytest.mark.parametrize("name", ["fast", "accurate", "rad", "superadd"])
def test_a_preset_of_patchcore_fits_and_detects(name: str) -> None:
    """With a small network in place of its own, and a small image in place of large ones."""
    rng = np.random.default_rng(0)
    good = rng.integers(100, 140, (16, 64, 64, 3), dtype=np.uint8)
    bad = good[:1].copy()
    bad[0, 16:40, 16:40] = 255
    small: dict[str, Any] = {"backbone": Small(), "image_size": 64, "false_alarm_rate": 0.2}
    small |= {"layers": None, "engine": "torch"}
    if name == "superadd":
        small |= {"tile": 64, "overlap": 16}
    detector = PatchCore.preset(name, **small).fit(good)
    found = detector.detect(bad)
    assert found.scores[0] > detector.threshold_
    assert found.maps[0].shape == (64, 64)
