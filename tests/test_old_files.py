"""Files of version 1 of each detector, calibration and training: read, asked, and learned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_fixtures import LAYERS, Squares, Transformer

from anomalib_lite import load
from anomalib_lite.engines import open_backbone
from anomalib_lite.errors import InvalidValueError

FIXTURES = Path(__file__).resolve().parent / "fixtures"
DETECTORS = ["patchcore_v1", "padim_v1", "mahalanobis_vfm_v1"]
# Another processor adds up in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}


def answers_of(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", [f"{name}_leave_one_out" for name in DETECTORS])
def test_files_calibrated_by_leaving_one_out_are_read(name: str) -> None:
    answers, detector = answers_of(name), load(FIXTURES / f"{name}.safetensors")
    assert detector.calibration == "leave_one_out"
    assert len(detector.calibration_scores_) == len(answers["E"])  # each was left out once
    assert detector.threshold_ == float(answers["threshold"])
    np.testing.assert_allclose(detector.score_embeddings(answers["E"]), answers["scores"], **CLOSE)
    with pytest.raises(InvalidValueError, match="needs a fit with calibration='split'"):
        detector.partial_fit_embeddings(answers["E"])


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_from_files_go_on_learning(name: str) -> None:
    answers, detector = answers_of("updated_v1"), load(FIXTURES / f"{name}.safetensors")
    before = detector.score_embeddings(answers["E"])
    detector.partial_fit_embeddings(answers["E"])
    after = detector.score_embeddings(answers["E"])
    assert not np.allclose(after, before, **CLOSE)
    np.testing.assert_allclose(after, answers[name], **CLOSE)
    np.testing.assert_allclose(detector.threshold_, answers[f"{name}_threshold"], **CLOSE)


@pytest.mark.parametrize("training", ["head", "finetune"])
def test_files_of_cascades_with_a_network_as_gate_are_read(training: str) -> None:
    name = f"gated_cascade_v1_{training}"
    answers = answers_of(name)
    # The weights are in the file: those of the modules do not count.
    modules = {"gate": Squares(), "detector": Squares()}
    cascade = load(FIXTURES / f"{name}.safetensors", backbone=modules)
    assert cascade.training == training
    assert cascade.synthetic_
    assert len(cascade.gate_.history) == {"head": 0, "finetune": 5}[training]
    assert (cascade.gate_.backbone.sha256 == cascade.detector_.backbone_.sha256) == (
        training == "head"
    )
    found = cascade.detect(answers["images"])
    assert list(found.routes) == list(answers["routes"])
    assert found.labels.tolist() == (answers["scores"] > 0.5).tolist()
    np.testing.assert_allclose(found.probabilities, answers["probabilities"], **CLOSE)
    np.testing.assert_allclose(found.scores, answers["scores"], **CLOSE)
    np.testing.assert_allclose(np.stack(found.maps), answers["maps"], **CLOSE)


def test_a_file_with_an_adapter_is_read() -> None:
    answers = answers_of("mahalanobis_vfm_v1_adapter")
    path = FIXTURES / "mahalanobis_vfm_v1_adapter.safetensors"
    detector = load(path, backbone=Transformer())
    assert (detector.adapt, detector.layers, detector.adapter_.rank) == ("lora", LAYERS, 2)
    assert detector.adapter_.sha256() == str(answers["adapter"])
    assert len(detector.adapter_.factors) == 4
    assert detector.threshold_ == float(answers["threshold"])
    found = detector.detect(answers["images"])
    assert found.labels.tolist() == (answers["scores"] > answers["threshold"]).tolist()
    np.testing.assert_allclose(found.scores, answers["scores"], **CLOSE)
    np.testing.assert_allclose(found.maps, answers["maps"], **CLOSE)
    # The file's factors are at work: the network without them gives other embeddings.
    plain = open_backbone(
        Transformer(), layers=LAYERS, fusion="summary", engine="torch", device="cpu"
    )
    assert plain.sha256 == detector.backbone_.sha256
    embedded = detector.backbone_.embed(answers["images"])
    assert not np.allclose(plain.embed(answers["images"]), embedded, **CLOSE)
