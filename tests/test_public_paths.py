"""Every path that users import from, as a list: a module may move, its public path may not."""

from __future__ import annotations

import importlib

import pytest

PATHS = {
    "anomalib_lite": "GatedCascade MahalanobisVFM MemoryBank PaDiM PatchCore "
    "ProductRouter SubspaceAD evaluate load",
    "anomalib_lite.anomaly_map": "IMAGE_SCORES anomaly_maps image_scores reweight",
    "anomalib_lite.backbones": "EMBEDDED Backbone",
    "anomalib_lite.calibration": "calibration_size conformal_threshold",
    "anomalib_lite.cascade": "CascadeDetections GatedCascade ProductDetections ProductRouter",
    "anomalib_lite.cascade.router": "ProductDetections ProductRouter",
    "anomalib_lite.cli": "main",
    "anomalib_lite.coreset": "METHODS Coreset covering_radius greedy_k_center select_coreset",
    "anomalib_lite.datasets": "BTAD ELPV NEUDET Dataset Folder KolektorSDD KolektorSDD2 MVTecAD "
    "MVTecAD2 MVTecLOCO MagneticTile RealIAD Sample Textile VisA find_shared load_mask "
    "open_dataset",
    "anomalib_lite.demo": "run_demo",
    "anomalib_lite.detectors": "BaseDetector Detections MahalanobisVFM PaDiM PatchCore SubspaceAD",
    "anomalib_lite.domain_shift": "cosine_distance feature_drift frechet_distance mmd "
    "sliced_wasserstein",
    "anomalib_lite.engines": "ENGINES CompiledBackbone open_backbone",
    "anomalib_lite.errors": "AnomalibLiteError CalibrationWarning ImageError NotFittedError "
    "SharedImagesWarning",
    "anomalib_lite.evaluation": "Report evaluate",
    "anomalib_lite.fusion": "EmbeddingTransform PROJECTIONS STRATEGIES patch_embeddings",
    "anomalib_lite.gaussian": "Gaussian GaussianGrid",
    "anomalib_lite.images": "ImageSource iter_batches",
    "anomalib_lite.images.copies": "Copies find_copies",
    "anomalib_lite.lora": "adaptive_rank train_adapter",
    "anomalib_lite.memory_bank": "MemoryBank",
    "anomalib_lite.metrics": "aupimo aupimo_scores aupro auroc average_precision f1_max fpr_at_tpr "
    "pixel_auroc pixel_average_precision pixel_f1_max pointing_game seg_f1 "
    "bootstrap_interval paired_test PixelMetrics",
    "anomalib_lite.persistence": "FORMAT_VERSION load",
    "anomalib_lite.plotting": "color_bar contact_sheet copies_sheet legend_colors overlay",
    "anomalib_lite.subspace": "Subspace",
    "anomalib_lite.networks": "NETWORKS Network whereabouts",
    "anomalib_lite.studies": "FeatureCache NetworkConfig Run StudyConfig open_study run_studies",
    "anomalib_lite.synthetic": "KINDS SyntheticAnomalies SyntheticAnomaly SyntheticSet",
}


@pytest.mark.parametrize(("module", "names"), PATHS.items())
def test_public_names_stay_where_they_are(module: str, names: str) -> None:
    found = importlib.import_module(module)
    assert set(names.split()) <= set(dir(found))
    listed = getattr(found, "__all__", None)
    assert listed is None or all(hasattr(found, name) for name in listed)
