"""ProductRouter: one model for many products; what an image shows decides which detector scores it.

References
----------
.. [1] Lee, Lee, Lee and Shin, "A Simple Unified Framework for Detecting Out-of-Distribution Samples
   and Adversarial Attacks", NeurIPS 2018, arXiv:1807.03888.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state

from anomalib_lite._validation import check_image_size, check_number, check_seed, refuse_labelled
from anomalib_lite.anomaly_map import anomaly_maps
from anomalib_lite.calibration import calibration_size, threshold_and_shortfall
from anomalib_lite.detectors import BaseDetector, Detections, DetectorMixin, PatchCore
from anomalib_lite.detectors.fitting import CountedEmbeddings, none_usable
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import (
    CalibrationWarning,
    InvalidTypeError,
    InvalidValueError,
    NotFittedError,
)
from anomalib_lite.gaussian import Gaussian
from anomalib_lite.images import Batch, Extractor, ImageSource
from anomalib_lite.images.embeddings import assemble, image_size_for, stack

__all__ = ["ProductDetections", "ProductRouter"]

_WHERE = "ProductRouter"
UNKNOWN, SKIPPED = "unknown", "skipped"  # routes that are no products
# The least number of images of a product: two for mean and spread, two to calibrate with.
_LEAST_IMAGES = 4
_JUST_ABOVE_1 = np.nextafter(np.float32(1), np.float32(2))


@dataclass(frozen=True)
class ProductDetections(Detections):
    """Results of a :class:`~anomalib_lite.ProductRouter` for each image.

    ``scores`` are in multiples of the ``threshold_`` of the product's detector, and ``maps`` in
    those of its ``pixel_threshold_``. The score of an image that shows none of the products is
    infinite.

    Attributes
    ----------
    routes : ndarray of shape (N,), str
        The product whose detector decided; ``"unknown"`` for none of them; or ``"skipped"``.
    nearest : ndarray of shape (N,), str
        The nearest product, also for an unknown image: its detector made the heatmap. Empty for an
        image that was skipped.
    distances : ndarray of shape (N,), float32
        Distance to the nearest product, in multiples of the distance above which an image is
        unknown; NaN for an image that was skipped.
    """

    routes: np.ndarray = field(default_factory=lambda: np.empty(0, str))
    nearest: np.ndarray = field(default_factory=lambda: np.empty(0, str))
    distances: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))


class ProductRouter(DetectorMixin, BaseEstimator):
    """One model of many products: finds the product of an image, and scores it by its detector.

    Parameters
    ----------
    detector : BaseDetector, optional
        An unfitted detector, of which each product gets a copy; by default ``PatchCore()``. Its
        ``image_size``, ``batch_size``, ``on_error`` and other options hold for the router;
        ``image_size="auto"`` is the largest that a product's images give. Its ``n_jobs`` has no
        effect.
    unknown_rate : float, default=0.01
        Share of future normal images of each product that may be called unknown, in (0, 1).
    random_state : int, RandomState or None, default=0
        Seed of the choice of the images that calibrate the distances to products. The detector
        has its own.

    Attributes
    ----------
    detectors_ : dict of str to BaseDetector
        The fitted detector of each product. All have the same ``backbone_``.
    backbone_ : Backbone or CompiledBackbone
        The network that embeds images.
    products_ : list of str
        Names of the products, in the order of the arrays below.
    means_ : ndarray of shape (P, D), float64
        Mean over the images of a product of their mean patch embedding.
    unknown_thresholds_ : ndarray of shape (P,), float64
        Distance from each product above which an image is unknown.
    threshold_ : float
        1. An image with a larger score is called anomalous. An unknown one always is.
    skipped_ : list of (str, str)
        Name and reason of each training image left out.

    Notes
    -----
    An image is described by the mean g of its patch embeddings. Its distance from product p is

    .. math:: d_p = \\sqrt{(g - \\mu_p)^T \\Sigma^{-1} (g - \\mu_p)}

    with the mean :math:`\\mu_p` of the product and one covariance :math:`\\Sigma` of images around
    the means of their products, with Ledoit and Wolf's shrinkage [1]_. The nearest product is
    taken. The scores of the detectors are not used for that, because their units differ.

    A fifth to half of the images of each product, as many as ``unknown_rate`` needs, are held
    back: means and covariance are computed without them. Their distances from their product give
    its threshold, by
    :func:`~anomalib_lite.calibration.conformal_threshold`. The detectors are fitted on all images
    of their product. So a future normal image is called unknown with a probability of at most
    about ``unknown_rate``, and anomalous with at most about the sum of it and of the detector's
    ``false_alarm_rate``, if images of its product are not taken for another.

    The network runs once an image, in :meth:`fit` and in :meth:`detect`.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_lite import PatchCore, ProductRouter
    >>> rng = np.random.default_rng(0)
    >>> def photos(shade, n):
    ...     return rng.integers(shade, shade + 40, (n, 64, 96, 3), dtype=np.uint8)
    >>> router = ProductRouter(PatchCore(image_size=64, false_alarm_rate=0.1), unknown_rate=0.1)
    >>> router = router.fit({"dark": photos(20, 30), "light": photos(150, 30)})
    >>> found = router.detect(np.concatenate([photos(20, 1), photos(150, 1), photos(90, 1)]))
    >>> found.routes.tolist()
    ['dark', 'light', 'unknown']
    >>> found.labels.tolist()
    [False, False, True]
    """

    detectors_: dict[str, BaseDetector]

    def __init__(
        self, detector: Any = None, *, unknown_rate: float = 0.01, random_state: Any = 0
    ) -> None:
        self.detector = detector
        self.unknown_rate = unknown_rate
        self.random_state = random_state

    def fit(self, images: Mapping[str, Any]) -> Self:
        """Fit a detector for each product, and learn to tell products apart.

        Parameters
        ----------
        images : mapping of str to images
            Normal images of each product by its name; each in any form that
            :meth:`PatchCore.fit <anomalib_lite.PatchCore.fit>` takes.

        Returns
        -------
        ProductRouter
            Itself; after an error it is as before.

        Raises
        ------
        AnomalibLiteError
            For a parameter, a name or an image that cannot be used, or fewer than 4 images of a
            product.

        Warns
        -----
        CalibrationWarning
            If a product has too few images to guarantee ``unknown_rate``, or the detector's
            ``false_alarm_rate``.
        """
        self._check_parameters()
        template = self._prototype()
        products = _check_products(images, template.max_pixels)
        backbone = template._open_backbone()
        size = max(
            image_size_for(source, template.image_size, template.tile)
            for source in products.values()
        )
        check_image_size(size, _WHERE, stride=backbone.stride)
        _warn(self._learn(products, template, size, backbone, {}, {}))
        return self

    def add(self, images: Mapping[str, Any]) -> Self:
        """Add further products; the detectors of the others do not change.

        Parameters
        ----------
        images : mapping of str to images
            As in :meth:`fit`, of new products.

        Returns
        -------
        ProductRouter
            Itself; after an error it is as before.

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        InvalidValueError
            If there is already a product of that name, or as in :meth:`fit`.

        Warns
        -----
        CalibrationWarning
            As :meth:`fit`.
        """
        self._check_fitted()
        check_number("unknown_rate", self.unknown_rate, _WHERE, "(0, 1)")
        products = _check_products(images, self.max_pixels)
        for name in products.keys() & self.detectors_.keys():
            raise InvalidValueError(
                f"{_WHERE}: there is a product {name!r} already. Choose another name, or go on "
                f"with router.detectors_[{name!r}].partial_fit(images)."
            )
        known = dict(self._descriptions), dict(self.detectors_)
        one = self._first()
        _warn(self._learn(products, one, one.image_size_, self.backbone_, *known))
        return self

    def detect(self, images: Any, *, maps: bool = True) -> ProductDetections:
        """Return products, scores, labels and heatmaps, from one pass through the backbone.

        Parameters
        ----------
        images
            As in :meth:`PatchCore.fit <anomalib_lite.PatchCore.fit>`; of any products, mixed.
        maps : bool, default=True
            Whether to make heatmaps.

        Returns
        -------
        ProductDetections

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        AnomalibLiteError
            For an image that cannot be used, unless the detector has ``on_error="skip"``.
        """
        self._check_fitted()
        one = self._first()
        source = ImageSource(images, max_pixels=one.max_pixels, where=_WHERE)
        n, names = len(source), np.array(self.products_)
        scores, distances = np.full((2, n), np.nan, np.float32)
        places = np.full(n, -1)
        heatmaps: list[Any] = [None] * n
        skipped: list[tuple[int, str]] = []
        extractor = self._extractor(one, self.backbone_)
        for batch, E in extractor.embed_batches(source, skipped=skipped, progress="score"):
            indices = np.array(batch.indices)
            places[indices], distances[indices] = self._route(E.mean(axis=(1, 2)))
            for place in np.unique(places[indices]):
                rows = np.flatnonzero(places[indices] == place)
                detector = self.detectors_[self.products_[place]]
                patch_scores, raw = detector._score_raw(E[rows])
                scores[indices[rows]] = _relative(raw, detector)
                if maps:
                    made = _relative_maps(patch_scores, batch, rows, detector)
                    for index, heatmap in zip(indices[rows], made, strict=True):
                        heatmaps[index] = heatmap
        unknown = distances > 1
        scores[unknown] = np.inf
        nearest = np.where(places < 0, "", names[places])
        return ProductDetections(
            scores,
            self._labels(scores) | unknown,
            stack(heatmaps) if maps else None,
            source.names,
            skipped,
            np.where(unknown, UNKNOWN, np.where(places < 0, SKIPPED, nearest)),
            nearest,
            distances,
            pixel_threshold=1.0,  # maps are in multiples of it
        )

    # --- How it learns ------------------------------------------------------------------------

    def _learn(
        self,
        products: dict[str, ImageSource],
        template: BaseDetector,
        size: int | tuple[int, int],
        backbone: AnyBackbone,
        descriptions: dict[str, tuple[np.ndarray, np.ndarray]],
        detectors: dict[str, BaseDetector],
    ) -> list[tuple[str, str]]:
        """Add products to those that are known; return (product, shortfall) of each warning."""
        random, shortfalls = check_random_state(self.random_state), []
        skipped = list(self.skipped_) if detectors else []
        for name, source in products.items():
            _check_number_of_images(name, len(source))
            detector = _unfitted(template)
            detector.image_size_ = size
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", CalibrationWarning)
                means = self._fit_detector(detector, backbone, source)
            for warning in caught:
                if not issubclass(warning.category, CalibrationWarning):
                    warnings.warn_explicit(
                        warning.message, warning.category, warning.filename, warning.lineno
                    )
                else:
                    shortfalls.append((name, str(warning.message)))
            _check_number_of_images(name, len(means))
            order = random.permutation(len(means))
            n_held_back = calibration_size(self.unknown_rate, len(means))
            descriptions[name] = (means[order[n_held_back:]], means[order[:n_held_back]])
            detectors[name] = detector
            skipped += detector.skipped_
        fresh = copy.copy(self)
        fresh.detectors_, fresh.skipped_, fresh.backbone_ = detectors, skipped, backbone
        shortfalls += fresh._calibrate(descriptions)
        fresh.threshold_ = 1.0
        fresh._remember_parameters()
        self.__dict__.update(fresh.__dict__)
        return shortfalls

    def _fit_detector(
        self, detector: BaseDetector, backbone: AnyBackbone, source: ImageSource
    ) -> np.ndarray:
        """Fit one detector with the common network; return the descriptions (n, D) of images."""
        found: dict[int, np.ndarray] = {}
        skipped: list[tuple[int, str]] = []
        extractor = self._extractor(detector, backbone)

        def batches() -> Iterator[tuple[list[int], np.ndarray]]:
            for batch, E in extractor.embed_batches(source, skipped=skipped, progress="fit"):
                found.update(zip(batch.indices, E.mean(axis=(1, 2)), strict=True))
                yield batch.indices, E

        if detector.memory_budget is None:
            embeddings: Any = assemble(len(source), batches())
            if not found:
                raise none_usable(source, skipped)
        else:
            # Never all in memory.
            embeddings = CountedEmbeddings((E for _, E in batches()), len(source))
        detector.fit_embeddings(embeddings)
        detector.image_size_ = extractor.image_size
        detector._take_backbone(backbone)
        detector.ignore_mask_ = None
        detector.skipped_ = [(source.names[i], reason) for i, reason in sorted(skipped)]
        return np.array([found[i] for i in sorted(found)])

    def _calibrate(
        self, descriptions: dict[str, tuple[np.ndarray, np.ndarray]]
    ) -> list[tuple[str, str]]:
        """Compute means, covariance and thresholds; return (product, shortfall) of each."""
        self.products_ = list(descriptions)
        known = [fit_on.astype(np.float64) for fit_on, _ in descriptions.values()]
        self.means_ = np.stack([rows.mean(axis=0) for rows in known])
        around = [rows - mean for rows, mean in zip(known, self.means_, strict=True)]
        try:
            self._gaussian = Gaussian().fit(np.concatenate(around))
        except InvalidValueError as error:
            raise InvalidValueError(
                f"{_WHERE}: the images of each product are too much alike to know how far they "
                "may be from its mean. Give more that differ."
            ) from error
        thresholds, shortfalls = [], []
        for p, (name, (_, held_back)) in enumerate(descriptions.items()):
            own = self._gaussian.mahalanobis(held_back - self.means_[p])
            threshold, shortfall = threshold_and_shortfall(own, self.unknown_rate)
            thresholds.append(threshold)
            if shortfall is not None:
                reason = shortfall.replace("false_alarm_rate=", "unknown_rate=").split(";")[0]
                reason += f", which guarantee {1 / (len(own) + 1):.3g} at best."
                shortfalls.append((name, reason))
        self.unknown_thresholds_ = np.maximum(thresholds, np.finfo(np.float32).tiny)
        self._descriptions = descriptions
        return shortfalls

    def _route(self, described: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the place of the nearest product, and the distance in units of its threshold."""
        each = [self._gaussian.mahalanobis(described - mean) for mean in self.means_]
        places = np.argmin(each, axis=0)
        ratio = np.min(each, axis=0) / self.unknown_thresholds_[places]
        return places, np.minimum(ratio, np.finfo(np.float32).max).astype(np.float32)

    # --- Its parameters -----------------------------------------------------------------------

    def _check_parameters(self) -> None:
        if self.detector is not None and not isinstance(self.detector, BaseDetector):
            raise InvalidTypeError(
                f"{_WHERE}: detector must be an unfitted detector such as PatchCore(), or None, "
                f"got {self.detector!r}."
            )
        check_number("unknown_rate", self.unknown_rate, _WHERE, "(0, 1)")
        check_seed(self.random_state, _WHERE)
        prototype = self._prototype()
        prototype._check_parameters()
        prototype._check_fit_on_embeddings()  # one network for all cannot be adapted to each

    def _prototype(self) -> BaseDetector:
        """Return the unfitted detector of which each product gets one."""
        given: BaseDetector | None = self.detector
        return PatchCore() if given is None else given

    def _extractor(self, detector: BaseDetector, backbone: AnyBackbone) -> Extractor:
        options = detector.image_size_, detector.batch_size, detector.on_error, detector.verbose
        return Extractor(backbone, *options, tile=detector.tile, overlap=detector.overlap)

    def _check_fitted(self) -> None:
        if not hasattr(self, "detectors_"):
            raise NotFittedError(f"{_WHERE}: not fitted yet. Call fit(images) first.")
        self._refuse_changes()

    def _first(self) -> BaseDetector:
        """Return a detector whose options are those of the router."""
        if hasattr(self, "detectors_"):
            return next(iter(self.detectors_.values()))
        return self._prototype()

    @property
    def backbone(self) -> Any:
        """The detector's argument."""
        return self._first().backbone

    @property
    def weights(self) -> Any:
        """The detector's argument."""
        return self._first().weights

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """The detector's argument."""
        return self._first().batch_size

    @property
    def on_error(self) -> str:  # type: ignore[override]
        """The detector's argument."""
        return self._first().on_error

    @property
    def max_pixels(self) -> int:  # type: ignore[override]
        """The detector's argument."""
        return self._first().max_pixels

    @property
    def _routes(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.products_, UNKNOWN)

    # --- Its file -----------------------------------------------------------------------------

    def _fitted_backbone(self) -> AnyBackbone | None:
        return self.backbone_

    def _open_backbone(self, **instead: Any) -> AnyBackbone:
        return self._first()._open_backbone(**instead)

    def _take_backbone(self, backbone: AnyBackbone) -> None:
        self.backbone_ = backbone
        for detector in self.detectors_.values():
            detector._take_backbone(backbone)

    def _members(self) -> dict[str, DetectorMixin]:
        members: dict[str, DetectorMixin] = {}
        for i, detector in enumerate(self.detectors_.values()):
            member = copy.copy(detector)
            del member.backbone_  # the file has it once, as the router's
            members[f"product{i}"] = member
        return members

    def _plain_parameters(self) -> dict[str, Any]:
        return super()._plain_parameters() | {"detector": None}

    def _with_options(self, **options: Any) -> Self:
        other = copy.copy(self)
        other.detectors_ = {n: d._with_options(**options) for n, d in self.detectors_.items()}
        return other

    def _summary_lines(self) -> list[tuple[str, str]]:
        return [("products", ", ".join(self.products_))]

    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays: dict[str, np.ndarray] = {}
        for i, (fit_on, held_back) in enumerate(self._descriptions.values()):
            arrays |= {f"known{i}": fit_on, f"held_back{i}": held_back}
        state = {"products": self.products_, "detector_given": self.detector is not None}
        return arrays, state

    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        names = list(state["products"])
        self._calibrate(
            {n: (arrays[f"known{i}"], arrays[f"held_back{i}"]) for i, n in enumerate(names)}
        )

    @classmethod
    def _restore(
        cls,
        parameters: dict[str, Any],
        arrays: dict[str, np.ndarray],
        state: dict[str, Any],
        members: dict[str, Any],
    ) -> Self:
        own = {n: v for n, v in parameters.items() if n in cls._get_param_names()}
        if state["detector_given"]:
            own["detector"] = _unfitted(members["product0"])
        router = super()._restore(own, arrays, state, members)
        router.detectors_ = {n: members[f"product{i}"] for i, n in enumerate(router.products_)}
        return router


def _unfitted(detector: BaseDetector) -> BaseDetector:
    """Return an unfitted copy; a module is not copied, so all copies share it."""
    return type(detector)(**detector.get_params(deep=False))


def _check_number_of_images(name: str, n: int) -> None:
    if n < _LEAST_IMAGES:
        raise InvalidValueError(
            f"{_WHERE}: a product needs at least {_LEAST_IMAGES} images that can be used, two to "
            f"know it by and two to know how they vary, got {n} of {name!r}."
        )


def _check_products(images: Any, max_pixels: int) -> dict[str, ImageSource]:
    """Return the images of each product by its name."""
    if not isinstance(images, Mapping):
        raise InvalidTypeError(
            f"{_WHERE}: images must be a mapping from the name of a product to its images, such "
            f'as {{"screw": "photos/screw"}}, got {type(images).__name__}.'
        )
    if not images:
        raise InvalidValueError(f"{_WHERE}: images is empty. Give at least one product.")
    for name, given in images.items():
        if not isinstance(name, str) or name in ("", UNKNOWN, SKIPPED):
            raise InvalidValueError(
                f"{_WHERE}: the name of a product must be a string, not empty and neither "
                f"{UNKNOWN!r} nor {SKIPPED!r}, got {name!r}."
            )
        refuse_labelled(given, _WHERE, "fit takes normal images only.")
    return {
        name: ImageSource(given, max_pixels=max_pixels, where=_WHERE)
        for name, given in images.items()
    }


def _warn(shortfalls: list[tuple[str, str]]) -> None:
    """Warn once of each kind of shortfall, at the line of the user who called fit or add."""
    for reason in dict.fromkeys(reason for _, reason in shortfalls):
        names = [name for name, other in shortfalls if other == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        message = f"{_WHERE}: product {names[0]!r}{more}: {reason}"
        warnings.warn(message, CalibrationWarning, stacklevel=3)


def _relative(scores: np.ndarray, detector: BaseDetector) -> np.ndarray:
    """Return scores in multiples of the detector's threshold, above 1 exactly if they exceed it."""
    above = detector._labels(scores)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (scores.astype(np.float64) / detector.threshold_).astype(np.float32)
    return np.where(above, np.fmax(ratio, _JUST_ABOVE_1), np.fmin(ratio, np.float32(1)))


def _relative_maps(
    patch_scores: np.ndarray, batch: Batch, rows: np.ndarray, detector: BaseDetector
) -> list[np.ndarray]:
    """Return heatmaps of some images of a batch, in multiples of the threshold of its heatmaps."""
    unit = np.float32(max(detector._map_threshold, float(np.finfo(np.float32).tiny)))
    sizes = [batch.sizes[row] for row in rows]
    return anomaly_maps(patch_scores / unit, batch.pixels.shape[1:3], sizes, detector.smoothing)
