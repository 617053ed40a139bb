"""Parameters under a name: those of papers, and two of our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from anomalib_lite.errors import InvalidValueError

__all__ = ["PRESETS", "Preset", "PresetMixin"]


@dataclass(frozen=True)
class Preset:
    """Parameters of a detector under a name.

    Attributes
    ----------
    parameters : dict
        What differs from the detector's defaults.
    source : str
        Where they come from.
    differs : str
        What the source does otherwise, if anything.
    """

    parameters: dict[str, Any]
    source: str
    differs: str = ""


_OURS = "benchmarks/options"
_NO_CROP = "The source cuts the middle out of the image. Here the whole image is looked at."
_NO_FINAL_NORM = "The source normalises the last layer once more before it takes features."
_AVERAGED = "Here features are averaged over 3 x 3 patches."

# Detector -> name -> preset.
PRESETS: dict[str, dict[str, Preset]] = {
    "PatchCore": {
        "fast": Preset({"image_size": 192, "coreset_size": 1000}, _OURS),
        "accurate": Preset(
            {"backbone": "efficientnet_lite2", "image_size": 384, "fusion": "per_layer"},
            "benchmarks/accuracy",
        ),
        "paper": Preset(
            {
                "backbone": "wide_resnet50_2",
                "layers": ("layer2", "layer3"),
                "image_size": 256,
                "coreset_ratio": 0.1,
                "image_score": "reweighted",
            },
            "Roth et al., CVPR 2022, arXiv:2106.08265",
            f"{_NO_CROP} The coreset is chosen without a random projection.",
        ),
        "anomalydino": Preset(
            {
                "backbone": "dinov2_vits14",
                "layers": ("blocks.11",),
                "fusion": "nearest",
                "normalize": True,
                "image_size": 448,
                "coreset_ratio": 1.0,
                "image_score": "top1%",
            },
            "Damm et al., WACV 2025, arXiv:2405.14529",
            f"{_NO_FINAL_NORM} Of few images it rotates copies (augment='rotations'), and on "
            "objects it leaves out the background (foreground=True): set these if they fit.",
        ),
        "rad": Preset(
            {
                "backbone": "dinov3_vitb16",
                "layers": ("blocks.3", "blocks.6", "blocks.9", "blocks.11"),
                "fusion": "per_layer",
                "normalize": True,
                "image_size": 512,
                "coreset_ratio": 1.0,
                "position_window": 1,
                "image_score": "top1% pixels",
                "smoothing": 2.0,
            },
            "RAD, github.com/longkukuhi/RAD",
            f"{_NO_CROP} {_NO_FINAL_NORM} {_AVERAGED} It searches only the training images whose "
            "whole is most alike.",
        ),
        "superadd": Preset(
            {
                "backbone": "dinov3_vitl16",
                "layers": ("blocks.5", "blocks.11", "blocks.17", "blocks.23"),
                "fusion": "per_layer",
                "image_size": 640,
                "tile": 1024,
                "overlap": 205,
                "augment": "brightness",
                "coreset_size": 100_000,
                "coreset": "random",
                "image_score": "top0.1% pixels",
            },
            "SuperADD, github.com/LukasRoom/SuperADD; layers and image score as in anomalib 2.6",
            f"Its network is a larger one (ViT-H+), its patches are thinned by density, and its "
            f"heatmaps are cleaned afterwards. {_AVERAGED}",
        ),
    },
    "PaDiM": {
        "paper": Preset(
            {
                "backbone": "wide_resnet50_2",
                "layers": ("layer1", "layer2", "layer3"),
                "image_size": (256, 256),
                "n_components": 550,
            },
            "Defard et al., ICPR 2021, arXiv:2011.08785",
            _NO_CROP,
        ),
        "paper_resnet18": Preset(
            {
                "backbone": "resnet18",
                "layers": ("layer1", "layer2", "layer3"),
                "image_size": (256, 256),
                "n_components": 100,
            },
            "Defard et al., ICPR 2021, arXiv:2011.08785",
            _NO_CROP,
        ),
    },
    "MahalanobisVFM": {
        "paper": Preset(
            {"backbone": "efficientnet_b0", "normalize": False, "global_weight": 1.0},
            "Rippel, Mertens and Merhof, ICPR 2020, arXiv:2005.14140",
            "Its network is larger (EfficientNet-B4), and it adds the distances of all its stages.",
        ),
    },
    "SubspaceAD": {
        "paper": Preset(
            {
                "backbone": "vit_giant_patch14_reg4_dinov2.lvd142m",
                "layers": tuple(f"blocks.{i}" for i in range(22, 29)),
                "fusion": "mean",
                "image_size": 672,
                "image_score": "top1% pixels",
            },
            "SubspaceAD, arXiv:2602.23013",
            "Of few images it fits on 30 rotated copies: augment='rotations' gives 7.",
        ),
    },
}


class PresetMixin:
    """Adds :meth:`preset` to a detector."""

    @classmethod
    def preset(cls, name: str, **parameters: Any) -> Self:
        """Make an unfitted detector with parameters that have a name.

        Parameters
        ----------
        name : str
            One of those that the page on presets lists for this detector, such as ``"accurate"``.
        **parameters
            Other parameters, which have precedence over those of the preset; ``coreset_size`` also
            over its ``coreset_ratio``.

        Returns
        -------
        BaseDetector
            Its ``get_params()`` shows all parameters.

        Raises
        ------
        InvalidValueError
            For an unknown name.

        Examples
        --------
        >>> from anomalib_lite import PatchCore
        >>> detector = PatchCore.preset("fast", false_alarm_rate=0.05)
        >>> detector.image_size, detector.coreset_size, detector.false_alarm_rate
        (192, 1000, 0.05)
        """
        tables = (PRESETS[c.__name__] for c in cls.__mro__ if c.__name__ in PRESETS)
        known: dict[str, Preset] = next(tables, {})  # a subclass has those of its parent
        if name not in known:
            names = ", ".join(repr(n) for n in known) or "none"
            raise InvalidValueError(
                f"{cls.__name__}: preset must be one of its presets ({names}), got {name!r}."
            )
        chosen = dict(known[name].parameters)
        if "coreset_size" in parameters:  # a share of the preset would go before it
            chosen.pop("coreset_ratio", None)
        return cls(**(chosen | parameters))
