"""Patch embeddings -> shorter, whitened or rescaled ones, by a map learned from normal patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state

from anomalib_lite._validation import (
    check_bool,
    check_choice,
    check_int,
    check_matrix,
    check_number,
    check_seed,
)
from anomalib_lite.errors import InvalidTypeError, InvalidValueError, NotFittedError
from anomalib_lite.gaussian import Moments

__all__ = ["PROJECTIONS", "EmbeddingTransform"]

PROJECTIONS = ("pca", "gaussian_random")

# A variance below this share of the largest is rounding: nothing can be divided by its root.
_SMALLEST_SHARE = 1e-12


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Divide each row (n, D) by its length; a row of zeros stays.

    Euclidean distances between such rows rank as cosine distances do:
    ``|x - y|^2 = 2 (1 - cos(x, y))``.

    >>> unit_rows(np.float32([[3, 4], [0, 0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return np.asarray(rows / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None])


def _as_rows(E: Any) -> Any:
    """Return embeddings (..., D) as rows (n, D); what is no such array as it is."""
    try:
        E = np.asarray(E)
    except ValueError:  # arrays of several shapes
        return E
    return E if E.ndim == 0 or 0 in E.shape else E.reshape(-1, E.shape[-1])


class EmbeddingTransform(TransformerMixin, BaseEstimator):
    """Scales the layers of patch embeddings, then projects, whitens and normalizes them.

    Parameters
    ----------
    feature_dim : int, optional
        Length d of an embedding after the projection; by default it stays as it is.
    projection : {"pca", "gaussian_random"}, default="pca"
        What ``feature_dim`` is reached by: the principal components of normal patches, or random
        directions.
    whiten : bool, default=False
        Whether to multiply by the inverse square root of the covariance of normal patches, so that
        every direction counts alike.
    whiten_shrinkage : float in [0, 1], default=0.07
        Weight of the multiple of the identity in that covariance. 1 does nothing but rescale.
    normalize : bool, default=False
        Whether to divide each embedding by its length in the end.
    layer_weights : sequence of float, "adaptive" or None, default=None
        What the channels of each layer are multiplied by before all else. ``"adaptive"`` gives
        each layer the same total variance over normal patches.
    per_layer : bool, default=False
        Whether to project, whiten and normalize each layer by itself; ``feature_dim`` is then the
        length of each.
    random_state : int, RandomState or None, default=0
        Seed of random directions.

    Attributes
    ----------
    parts_ : list of LinearMap
        The map of each layer with ``per_layer``, else one for all.
    channels_ : tuple of int
        Number of channels of each layer, before the projection.
    copies_ : int
        2 if the features of a patch are followed by those of its image, else 1.
    n_features_in_, n_features_ : int
        Lengths of an embedding before and after.
    n_images_ : int
        Number of images that it was learned from.

    Notes
    -----
    With the diagonal matrix W of the layers' weights, the mean m and the covariance S of the
    normal patches W x, the projection P (D, d), and :math:`T = P^T S P`, an embedding x becomes

    .. math:: T_a^{-1/2} P^T (W x - m), \\quad T_a = (1 - a) T + a \\frac{tr T}{d} I

    with a the ``whiten_shrinkage``; without ``whiten`` the first factor is missing. PCA and
    whitening subtract the mean, as scikit-learn's do; random directions alone and weights alone do
    not. Random directions are those of scikit-learn's ``GaussianRandomProjection``:
    :math:`P_{ij} \\sim N(0, 1/d)`. Euclidean distances after whitening are Mahalanobis distances;
    a shrinkage of 0.07 is that of MH-PatchCore.

    ``"adaptive"`` is a rule of ours: layer l of total variance :math:`v_l` (the trace of its
    covariance) has the weight :math:`\\sqrt{\\bar v / v_l}` with the mean :math:`\\bar v` over
    the layers. It is the same to first divide each layer by the root mean square of its lengths,
    and then weight squared distances by the inverse of the variance that is left. So neither the
    scale of a layer nor its number of channels decides how much it counts.

    In float32 the map of an image does not depend on other images in its batch.

    Examples
    --------
    >>> import numpy as np
    >>> E = np.random.default_rng(0).normal(size=(8, 4, 6, 20)).astype("float32")
    >>> transform = EmbeddingTransform(feature_dim=5, whiten=True).fit(E)
    >>> transform.transform(E).shape
    (8, 4, 6, 5)
    """

    parts_: list[LinearMap]
    channels_: tuple[int, ...]

    def __init__(
        self,
        *,
        feature_dim: int | None = None,
        projection: str = "pca",
        whiten: bool = False,
        whiten_shrinkage: float = 0.07,
        normalize: bool = False,
        layer_weights: Sequence[float] | str | None = None,
        per_layer: bool = False,
        random_state: Any = 0,
    ) -> None:
        self.feature_dim = feature_dim
        self.projection = projection
        self.whiten = whiten
        self.whiten_shrinkage = whiten_shrinkage
        self.normalize = normalize
        self.layer_weights = layer_weights
        self.per_layer = per_layer
        self.random_state = random_state

    def fit(self, E: Any, y: object = None, *, channels: Sequence[int] | None = None) -> Self:
        """Learn from embeddings of normal patches.

        Parameters
        ----------
        E : array of shape (..., D), any float type
        y : ignored
        channels : sequence of int, optional
            Number of channels of each layer; they add up to D. By default all are one layer.

        Returns
        -------
        EmbeddingTransform
            Itself.

        Raises
        ------
        InvalidValueError
            For a parameter that cannot be used, for more components than there are channels or
            patches, and for a covariance that has no inverse.
        InvalidTypeError
            For embeddings that are no array of numbers.
        """
        rows = check_matrix("E", _as_rows(E), "EmbeddingTransform")
        moments = Moments(rows.shape[1])
        moments.add(rows)
        n_images = len(E) if np.ndim(E) == 4 else 1
        return self.fit_moments(moments, channels=channels, n_images=n_images)

    def fit_moments(
        self,
        moments: Moments,
        *,
        channels: Sequence[int] | None = None,
        copies: int = 1,
        n_features: int | None = None,
        n_images: int = 1,
    ) -> Self:
        """Do what :meth:`fit` does, from the moments of rows that are no longer at hand.

        Parameters
        ----------
        moments : Moments
            Of the first sum(channels) features of the patches.
        channels : sequence of int, optional
            As in :meth:`fit`.
        copies : int, default=1
            2 if as many features of the image follow: the same map is for them. What follows these
            (the attention) stays as it is.
        n_features : int, optional
            D, if more follows than copies.
        n_images : int, default=1
            Number of images that the rows are from.
        """
        self.check()
        layers = (len(moments.mean),) if channels is None else tuple(int(c) for c in channels)
        if sum(layers) != len(moments.mean) or min(layers) < 1:
            raise InvalidValueError(
                f"EmbeddingTransform: channels must add up to the {len(moments.mean)} features, "
                f"got {layers}."
            )
        random = check_random_state(self.random_state)
        covariance = moments.scatter / max(1, moments.n - 1)
        scale = self._scale(covariance, layers)
        parts, begin = [], 0
        for size in layers if self.per_layer else (sum(layers),):
            at = slice(begin, begin + size)
            own = None if scale is None else scale[at]
            parts.append(self._part(moments.mean[at], covariance[at, at], own, moments.n, random))
            begin += size
        self.parts_, self.channels_, self.copies_ = parts, layers, copies
        self.n_features_in_ = copies * sum(layers) if n_features is None else n_features
        self.n_images_ = n_images
        return self

    def check(self, where: str = "EmbeddingTransform") -> None:
        """Raise for the first parameter that cannot be used; ``where`` begins the message."""
        if self.feature_dim is not None:
            check_int("feature_dim", self.feature_dim, where, low=1)
        check_choice("projection", self.projection, PROJECTIONS, where)
        for name in ("whiten", "normalize", "per_layer"):
            check_bool(name, getattr(self, name), where)
        check_number("whiten_shrinkage", self.whiten_shrinkage, where, "[0, 1]")
        check_seed(self.random_state, where)
        weights = self.layer_weights
        if weights is None or weights == "adaptive":
            return
        if not isinstance(weights, list | tuple) or not weights:
            raise InvalidTypeError(
                f"{where}: layer_weights must be a list of numbers, one a layer, got {weights!r}."
            )
        for weight in weights:
            check_number("layer_weights", weight, where, "(0, inf)")

    def _scale(self, covariance: np.ndarray, layers: tuple[int, ...]) -> np.ndarray | None:
        """Return what each channel is multiplied by."""
        weights: Any = self.layer_weights
        if weights is None:
            return None
        if weights == "adaptive":
            ends = np.cumsum(layers)[:-1]
            variances = np.array([part.sum() for part in np.split(covariance.diagonal(), ends)])
            if not variances.min() > _SMALLEST_SHARE * variances.max():
                raise InvalidValueError(
                    "EmbeddingTransform: the features of layer "
                    f"{int(variances.argmin())} of {len(layers)} do not vary over normal patches, "
                    "so it can have no weight. Leave that layer out, or give layer_weights."
                )
            weights = np.sqrt(variances.mean() / variances)
        if len(weights) != len(layers):
            raise InvalidValueError(
                f"EmbeddingTransform: layer_weights must hold one number for each of {len(layers)} "
                f"layers, got {len(weights)}."
            )
        return np.repeat(np.asarray(weights, np.float64), layers)

    def _part(
        self,
        mean: np.ndarray,
        covariance: np.ndarray,
        scale: np.ndarray | None,
        n: int,
        random: np.random.RandomState,
    ) -> LinearMap:
        """Learn the map of some channels from their mean, covariance and weights."""
        size, d = len(mean), self.feature_dim
        floats = None if scale is None else scale.astype(np.float32)
        if d is None and not self.whiten:
            return LinearMap(size, size, floats)
        if scale is not None:
            mean, covariance = scale * mean, covariance * np.outer(scale, scale)
        if d is not None and d > (most := min(size, n) if self.projection == "pca" else size):
            raise InvalidValueError(
                f"EmbeddingTransform: feature_dim={d} is more than the {most} that {n} patches of "
                f"{size} channels have. Lower it, or give more images."
            )
        if d is None:
            components = np.eye(size)
        elif self.projection == "pca":
            components = _principal(covariance, d)
        else:
            components = random.normal(0, d**-0.5, size=(d, size)).T
        centred = self.whiten or self.projection == "pca"
        if self.whiten:
            components = components @ self._whitening(components.T @ covariance @ components)
        return LinearMap(
            size,
            components.shape[1],
            floats,
            mean.astype(np.float32) if centred else None,
            np.ascontiguousarray(components, np.float32),
        )

    def _whitening(self, covariance: np.ndarray) -> np.ndarray:
        """Return the inverse square root of the shrunk covariance (d, d)."""
        shrinkage, d = float(self.whiten_shrinkage), len(covariance)
        variances, directions = np.linalg.eigh(covariance)
        variances = (1 - shrinkage) * variances + shrinkage * covariance.trace() / d
        if not variances.min() > _SMALLEST_SHARE * variances.max():
            raise InvalidValueError(
                f"EmbeddingTransform: the covariance of {d} features has no inverse with "
                f"whiten_shrinkage={shrinkage:g}: some directions do not vary over normal patches. "
                "Raise whiten_shrinkage, or lower feature_dim."
            )
        return np.asarray((directions / np.sqrt(variances)) @ directions.T)

    def transform(self, E: Any) -> np.ndarray:
        """Change embeddings.

        Parameters
        ----------
        E : array of shape (..., D)
            A row of NaN (an ignored patch) stays one.

        Returns
        -------
        ndarray of shape (..., d), float32

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        InvalidValueError
            If D differs from that of :meth:`fit`.
        """
        if not hasattr(self, "parts_"):
            raise NotFittedError("EmbeddingTransform: not fitted yet. Call fit(E) first.")
        E = np.asarray(E, np.float32)
        if E.ndim == 0 or E.shape[-1] != self.n_features_in_:
            raise InvalidValueError(
                f"EmbeddingTransform: E must have shape (..., {self.n_features_in_}), got "
                f"{E.shape}."
            )
        if E.ndim < 4:
            rows = self._transform_rows(E.reshape(-1, E.shape[-1]))
            return rows.reshape(*E.shape[:-1], self.n_features_)
        changed = np.empty((*E.shape[:-1], self.n_features_), np.float32)
        for one, grid in zip(changed, E, strict=True):  # a product of one size for each image
            one[:] = self.transform(grid)
        return changed

    def _transform_rows(self, rows: np.ndarray) -> np.ndarray:
        found, begin = [], 0
        for _ in range(self.copies_):
            for part in self.parts_:
                one = part.transform(rows[:, begin : begin + part.n_in])
                found.append(unit_rows(one) if self.normalize else one)
                begin += part.n_in
        found.append(rows[:, begin:])
        return np.concatenate(found, axis=1)

    @property
    def n_features_(self) -> int:
        """Length of an embedding after the transformation."""
        change = sum(part.n_out - part.n_in for part in self.parts_)
        return int(self.n_features_in_ + self.copies_ * change)

    @property
    def layers_(self) -> list[np.ndarray]:
        """Positions of the features of each layer among those after the transformation.

        Those of the image follow those of the patch, and what belongs to no layer comes last.
        """
        sizes = [part.n_out for part in self.parts_]
        ends, whole = np.cumsum(sizes), sum(sizes)
        rest = np.arange(self.copies_ * whole, self.n_features_)
        return [
            np.concatenate(
                [np.arange(end - n, end) + copy * whole for copy in range(self.copies_)] + [rest]
            )
            for n, end in zip(sizes, ends, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes that its arrays take."""
        return sum(array.nbytes for array in self.to_arrays()[0].values())

    # --- Its file -----------------------------------------------------------------------------

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what a file must hold of it, beside its parameters: arrays by name, and JSON."""
        arrays = {
            f"{i}.{name}": array
            for i, part in enumerate(self.parts_)
            for name, array in part.arrays().items()
        }
        description = {
            "parts": [[part.n_in, part.n_out] for part in self.parts_],
            "channels": list(self.channels_),
            "copies": self.copies_,
            "n_features_in": self.n_features_in_,
            "n_images": self.n_images_,
        }
        return arrays, description

    def set_arrays(self, arrays: dict[str, np.ndarray], description: dict[str, Any]) -> Self:
        """Become fitted from what :meth:`to_arrays` gave; ValueError if it does not fit."""
        self.parts_ = []
        for i, (n_in, n_out) in enumerate(description["parts"]):
            own = {name: arrays.get(f"{i}.{name}") for name in ("scale", "mean", "components")}
            self.parts_.append(LinearMap(int(n_in), int(n_out), **own).checked())
        self.channels_ = tuple(int(c) for c in description["channels"])
        self.copies_ = int(description["copies"])
        self.n_features_in_ = int(description["n_features_in"])
        self.n_images_ = int(description["n_images"])
        if sum(part.n_in for part in self.parts_) != sum(self.channels_):
            raise ValueError(f"parts of a transformation do not fit {self.channels_} channels")
        return self


@dataclass
class LinearMap:
    """The map of some channels: ``x -> (x * scale - mean) @ components``; None is left out.

    Attributes
    ----------
    n_in, n_out : int
    scale, mean : ndarray of shape (n_in,), float32, or None
    components : ndarray of shape (n_in, n_out), float32, or None
    """

    n_in: int
    n_out: int
    scale: np.ndarray | None = None
    mean: np.ndarray | None = None
    components: np.ndarray | None = None

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Map rows (n, n_in) to rows (n, n_out)."""
        if self.scale is not None:
            X = X * self.scale
        if self.mean is not None:
            X = X - self.mean
        return X if self.components is None else np.asarray(X @ self.components)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that it has, by name."""
        named = {"scale": self.scale, "mean": self.mean, "components": self.components}
        return {name: array for name, array in named.items() if array is not None}

    def checked(self) -> Self:
        """Return itself if all arrays fit; ValueError otherwise."""
        expected = {"components": (self.n_in, self.n_out)}
        for name, array in self.arrays().items():
            if array.shape != expected.get(name, (self.n_in,)) or array.dtype != np.float32:
                raise ValueError(f"{name} of a transformation has shape {array.shape}")
        if self.components is None and self.n_in != self.n_out:
            raise ValueError("a transformation has no components")
        return self


def _principal(covariance: np.ndarray, d: int) -> np.ndarray:
    """Return the d directions (D, d) of largest variance; the largest entry of each is positive."""
    _, directions = np.linalg.eigh(covariance)
    chosen = directions[:, ::-1][:, :d]
    largest = np.abs(chosen).argmax(axis=0)
    return np.asarray(chosen * np.sign(chosen[largest, np.arange(d)]))
