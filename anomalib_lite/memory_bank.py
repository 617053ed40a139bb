"""MemoryBank: what normal looks like, as a set of embeddings that can be searched."""

from __future__ import annotations

import math
import re
from typing import Any, Self

import faiss
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from anomalib_lite._validation import (
    check_choice,
    check_int,
    check_matrix,
    check_number,
    closest,
)
from anomalib_lite.coreset import select_coreset
from anomalib_lite.errors import InvalidTypeError, InvalidValueError, NotFittedError

__all__ = ["MemoryBank", "check_index"]

ALGORITHMS = ("auto", "faiss")

_WELL_KNOWN = ("flat", "HNSW32", "IVF64,Flat", "IVF256,Flat", "SQ8", "PQ8", "IVF64,PQ8")
# Queries whose distances are computed at once: bounds the (queries, k, D) array.
_BLOCK_QUERIES = 4096


class MemoryBank(BaseEstimator):
    """Nearest neighbours among remembered embeddings, by FAISS, with rooted distances.

    Parameters
    ----------
    n_neighbors : int, default=9
        Neighbours that :meth:`kneighbors` returns unless told otherwise.
    index : str, default="flat"
        ``"flat"`` searches exactly. Anything else is a FAISS index-factory string, such as
        ``"HNSW32"``, ``"IVF64,Flat"`` or ``"PQ16"``: which neighbours are found is then
        approximate, while how far they are is still exact.
    algorithm : {"auto", "faiss"}, default="auto"
        Who searches. Both mean FAISS at present.

    Attributes
    ----------
    embeddings_ : ndarray of shape (M, D), float32
        The embeddings in the bank.
    n_features_in_ : int
        D.
    covering_radius_ : float
        After :meth:`subsample`: largest distance from an embedding that was there to the
        nearest one that was kept.
    index_ : faiss.Index or None
        The trained FAISS index; ``None`` for ``"flat"``, which searches ``embeddings_`` itself
        and needs no copy of it.

    Notes
    -----
    FAISS calls squared Euclidean distances "distances" and computes them as
    ``|q|^2 + |x|^2 - 2 q.x``, which cancels where the two are close. Here FAISS says which
    neighbours are nearest; their distances are then computed from the differences, and rooted.
    A query that an approximate index finds too few neighbours for is searched exactly.

    References
    ----------
    Douze et al., "The Faiss library", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_lite import MemoryBank
    >>> bank = MemoryBank(n_neighbors=1).fit(np.float32([[0, 0], [10, 0]]))
    >>> distances, indices = bank.kneighbors(np.float32([[3, 4], [10, 1]]))
    >>> distances.ravel().tolist(), indices.ravel().tolist()
    ([5.0, 1.0], [0, 1])
    """

    embeddings_: np.ndarray
    index_: Any
    n_features_in_: int
    covering_radius_: float

    def __init__(
        self, n_neighbors: int = 9, *, index: str = "flat", algorithm: str = "auto"
    ) -> None:
        self.n_neighbors = n_neighbors
        self.index = index
        self.algorithm = algorithm

    def fit(self, X: Any, y: object = None) -> Self:
        """Fill the bank with ``X``, forgetting what was there.

        Parameters
        ----------
        X : array of shape (N, D), float32
            Embeddings, finite. Other number types are converted.
        y : ignored

        Returns
        -------
        MemoryBank
            Itself.

        Raises
        ------
        InvalidValueError
            For embeddings of the wrong shape or not finite, an unknown index or algorithm, or
            too few rows to train the index on.
        """
        check_int("n_neighbors", self.n_neighbors, "MemoryBank", low=1)
        check_choice("algorithm", self.algorithm, ALGORITHMS, "MemoryBank")
        check_index(self.index, "MemoryBank")
        self._remember(self._validated(X, reset=True))
        return self

    def add(self, X: Any) -> Self:
        """Put further embeddings into the bank; the first ones if it is empty.

        Parameters
        ----------
        X : array of shape (N, D), float32

        Returns
        -------
        MemoryBank: itself. A trained index is extended, not trained again.

        Raises
        ------
        InvalidValueError
            As in :meth:`fit`, or if D differs from that of the bank.
        """
        if not hasattr(self, "embeddings_"):
            return self.fit(X)
        X = self._validated(X, reset=False)
        self.embeddings_ = np.concatenate([self.embeddings_, X])
        if self.index_ is not None:
            self.index_.add(X)
        return self

    def subsample(
        self,
        amount: float | int,
        *,
        method: str = "greedy",
        random_state: int | np.random.RandomState | None = None,
    ) -> Self:
        """Keep a coreset of the bank.

        Parameters
        ----------
        amount : float or int
            A float in (0, 1] is a share of the bank, an int a number of embeddings.
        method : {"greedy", "random", "kmeans"}, default="greedy"
            See :func:`anomalib_lite.coreset.select_coreset`.
        random_state : int, RandomState or None

        Returns
        -------
        MemoryBank: itself, smaller, with ``covering_radius_`` set.

        Raises
        ------
        NotFittedError
            If the bank is empty.
        InvalidValueError
            If ``amount`` keeps nothing or more than there is.

        Examples
        --------
        >>> import numpy as np
        >>> bank = MemoryBank().fit(np.float32([[0], [1], [5], [9]]))
        >>> bank.subsample(0.5, random_state=0).embeddings_.ravel().tolist()
        [0.0, 9.0]
        """
        self._check_fitted()
        n = coreset_size(amount, len(self.embeddings_), "amount", "MemoryBank.subsample")
        coreset = select_coreset(self.embeddings_, n, method=method, random_state=random_state)
        self._remember(self.embeddings_[coreset.indices])
        self.covering_radius_ = coreset.covering_radius
        return self

    def kneighbors(
        self, X: Any, n_neighbors: int | None = None, return_distance: bool = True
    ) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        """Find the nearest embeddings of the bank for each row of ``X``.

        Parameters
        ----------
        X : array of shape (Q, D), float32
            Queries. A single query has shape (1, D).
        n_neighbors : int, optional
            How many; by default the ``n_neighbors`` of the bank.
        return_distance : bool, default=True
            Whether distances are wanted too.

        Returns
        -------
        distances : ndarray of shape (Q, n_neighbors), float32
            Euclidean (rooted), ascending. Only if ``return_distance``.
        indices : ndarray of shape (Q, n_neighbors), int64
            Rows of ``embeddings_``.

        Raises
        ------
        NotFittedError
            If the bank is empty.
        InvalidValueError
            If D differs, queries are not finite, or more neighbours are wanted than there are.
        """
        self._check_fitted()
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        check_int("n_neighbors", k, "MemoryBank.kneighbors", low=1, high=len(self.embeddings_))
        X = self._validated(X, reset=False)
        distances, indices = self.search(X, k)
        return (distances, indices) if return_distance else indices

    def search(self, X: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`kneighbors` for callers who know their array: (Q, D) float32, contiguous.

        Parameters
        ----------
        X : ndarray of shape (Q, D), float32
        k : int

        Returns
        -------
        distances : ndarray of shape (Q, k), float32
        indices : ndarray of shape (Q, k), int64
        """
        if self.index_ is None:
            indices = np.asarray(faiss.knn(X, self.embeddings_, k)[1])
        else:
            indices = np.asarray(self.index_.search(X, k)[1])
            short = (indices < 0).any(axis=1)  # inverted lists may hold fewer than k
            if short.any():
                indices[short] = faiss.knn(X[short], self.embeddings_, k)[1]
        return self._rank(X, indices)

    def serialized_index(self) -> np.ndarray:
        """The trained FAISS index as bytes, (n,) uint8, for :meth:`restore`.

        Raises
        ------
        InvalidValueError
            For ``"flat"``, which has no index beside the embeddings.
        """
        if self.index_ is None:
            raise InvalidValueError("MemoryBank: index='flat' has nothing to serialize.")
        return np.asarray(faiss.serialize_index(self.index_))

    @classmethod
    def restore(
        cls, embeddings: np.ndarray, serialized_index: np.ndarray | None, **parameters: Any
    ) -> MemoryBank:
        """A fitted bank from its arrays, with its index as it was trained.

        Parameters
        ----------
        embeddings : array of shape (M, D), float32
        serialized_index : array of shape (n,), uint8, or None
            What :meth:`serialized_index` gave; None for ``"flat"``.
        **parameters
            Of the constructor.

        Returns
        -------
        MemoryBank

        Raises
        ------
        InvalidValueError
            If the two do not belong together.

        Examples
        --------
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(99, 8)).astype("float32")
        >>> bank = MemoryBank(index="HNSW16").fit(X)
        >>> again = MemoryBank.restore(X, bank.serialized_index(), index="HNSW16")
        >>> bool((again.kneighbors(X)[0] == bank.kneighbors(X)[0]).all())
        True
        """
        bank = cls(**parameters)
        bank.embeddings_ = check_matrix("embeddings", embeddings, "MemoryBank")
        bank.n_features_in_ = bank.embeddings_.shape[1]
        bank.index_ = None
        if (serialized_index is None) != (bank.index == "flat"):
            raise InvalidValueError(f"MemoryBank: no serialized index fits index={bank.index!r}.")
        if serialized_index is not None:
            serialized_index = np.asarray(serialized_index)
            if serialized_index.dtype != np.uint8 or serialized_index.ndim != 1:
                raise InvalidValueError(
                    "MemoryBank: the serialized index must have shape (n,) and dtype uint8, got "
                    f"{serialized_index.shape} and {serialized_index.dtype}."
                )
            try:
                bank.index_ = faiss.deserialize_index(serialized_index)
            except RuntimeError as error:
                raise InvalidValueError(
                    f"MemoryBank: the serialized index is broken ({_faiss_reason(error)})."
                ) from error
            if (bank.index_.ntotal, bank.index_.d) != bank.embeddings_.shape:
                raise InvalidValueError(
                    f"MemoryBank: the index holds {bank.index_.ntotal} embeddings of "
                    f"{bank.index_.d} dimensions, expected {bank.embeddings_.shape}."
                )
        return bank

    def _rank(self, X: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact distances to the neighbours found, (Q, k), and both in ascending order."""
        distances = np.empty(indices.shape, np.float32)
        for start in range(0, len(X), _BLOCK_QUERIES):
            block = slice(start, start + _BLOCK_QUERIES)
            difference = self.embeddings_[indices[block]]  # (q, k, D)
            difference -= X[block, None]
            np.sqrt(np.einsum("qkd,qkd->qk", difference, difference), out=distances[block])
        if indices.shape[1] == 1:
            return distances, indices
        order = np.argsort(distances, axis=1, kind="stable")
        return np.take_along_axis(distances, order, 1), np.take_along_axis(indices, order, 1)

    def _remember(self, X: np.ndarray) -> None:
        index = None
        if self.index != "flat":
            try:
                index = faiss.index_factory(X.shape[1], self.index)
                _silence_training(index)
                index.train(X)
                index.add(X)
            except RuntimeError as error:
                raise InvalidValueError(
                    f"MemoryBank: index={self.index!r} cannot hold {X.shape[0]} embeddings of "
                    f"{X.shape[1]} dimensions ({_faiss_reason(error)}). Use index='flat', or one "
                    "with fewer lists or other sub-quantisers."
                ) from error
        self.embeddings_ = X
        self.index_ = index
        self.__dict__.pop("covering_radius_", None)  # it was that of another bank

    def _validated(self, X: Any, *, reset: bool) -> np.ndarray:
        try:
            X = validate_data(self, X, dtype=np.float32, order="C", reset=reset)
        except TypeError as error:
            raise InvalidTypeError(f"MemoryBank: {error}") from error
        except ValueError as error:
            raise InvalidValueError(f"MemoryBank: {error}") from error
        return np.asarray(X)

    def _check_fitted(self) -> None:
        if not hasattr(self, "embeddings_"):
            raise NotFittedError("MemoryBank: the bank is empty. Call fit(X) or add(X) first.")


def check_index(index: object, where: str) -> None:
    """Raise InvalidValueError unless ``index`` is ``"flat"`` or FAISS can build it."""
    if index == "flat":
        return
    try:
        if not isinstance(index, str):
            raise RuntimeError("not a string")
        # Whether FAISS can build it may depend on the dimension, which is not known yet: take one
        # that all numbers in the string divide.
        dividing = re.sub("(IVF|HNSW)[0-9]+", "", index)
        dimension = math.lcm(*(int(n) for n in re.findall("[1-9][0-9]*", dividing)))
        faiss.index_factory(min(dimension, 65536), index)
    except RuntimeError as error:
        raise InvalidValueError(
            f"{where}: index must be 'flat' or a FAISS index-factory string such as "
            f"{list(_WELL_KNOWN[1:])}, got {index!r}.{closest(index, _WELL_KNOWN)}"
        ) from error


def coreset_size(amount: float | int, n: int, name: str, where: str) -> int:
    """Number of rows that a share (float) or a number (int) of ``n`` rows is."""
    if isinstance(amount, int | np.integer) and not isinstance(amount, bool):
        return check_int(name, amount, where, low=1, high=n)
    size = round(check_number(name, amount, where, "(0, 1]") * n)
    if size < 1:
        raise InvalidValueError(
            f"{where}: {name}={amount:g} of {n} patches keeps none. Ask for at least {1 / n:.2g}."
        )
    return size


def _silence_training(index: Any) -> None:
    """Keep FAISS from printing that a coreset has few rows for each of its centroids."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    for clustered in (index, getattr(index, "pq", index)):
        if hasattr(clustered, "cp"):
            clustered.cp.min_points_per_centroid = 1


def _faiss_reason(error: RuntimeError) -> str:
    """FAISS's own words, without its function and file names."""
    return str(error).rsplit("Error: ", 1)[-1].splitlines()[0].strip()
