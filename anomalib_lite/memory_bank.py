"""MemoryBank: embeddings of normal patches that can be searched for nearest neighbours."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from anomalib_lite._validation import check_choice, check_int, check_matrix, check_values
from anomalib_lite.coreset import check_device, coreset_size, select_coreset
from anomalib_lite.errors import InvalidTypeError, InvalidValueError, NotFittedError
from anomalib_lite.neighbors import faiss_index, int8
from anomalib_lite.neighbors.faiss_index import check_index, faiss, serialize
from anomalib_lite.neighbors.int8_index import Int8Index

__all__ = ["MemoryBank", "check_index", "serialize"]

ALGORITHMS = ("auto", "faiss", "int8")

# Queries whose distances are computed at once: bounds the (queries, k, D) array.
_BLOCK_QUERIES = 4096
# Multiplications in a search from which 8-bit products save more time than their preparation takes,
# and from which they save more than importing torch takes.
_MANY, _VERY_MANY = 10**9, 10**12


class MemoryBank(BaseEstimator):
    """Nearest neighbours among stored embeddings, with Euclidean (rooted) distances.

    Parameters
    ----------
    n_neighbors : int, default=9
        Neighbours that :meth:`kneighbors` returns by default.
    index : str, default="flat"
        ``"flat"`` searches exactly. Anything else is a FAISS index-factory string, such as
        ``"HNSW32"``, ``"IVF64,Flat"`` or ``"PQ16"``: which neighbours are found is then
        approximate, while how far they are is still exact.
    algorithm : {"auto", "faiss", "int8"}, default="auto"
        What searches a flat index: ``"faiss"``, in float32; or ``"int8"``, which excludes most
        rows by products of 8-bit integers and compares the others in float32. Both find the
        same neighbours. ``"auto"`` takes ``"int8"`` for large searches where the processor
        has instructions for it (AVX-512 VNNI, AMX), which is about three times as fast there.
        ``"int8"`` is refused where the 8-bit products of torch are not exact.
    nprobe : int, optional
        For an index of kind ``"IVF..."``: cells looked into (FAISS: 1).
    ef_search : int, optional
        For an index of kind ``"HNSW..."``: rows kept in view on the walk (FAISS: 16).
    device : str, default="cpu"
        Device of torch that holds and searches a flat index, such as ``"cuda"``.

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
        The trained FAISS index; ``None`` for ``"flat"``, which searches ``embeddings_`` itself.

    Notes
    -----
    FAISS calls squared Euclidean distances "distances" and computes them as
    ``|q|^2 + |x|^2 - 2 q.x``, which loses digits if the two are close. Here FAISS finds the nearest
    neighbours; their distances are then computed from the differences, and rooted. If an
    approximate index finds too few neighbours for a query, that query is searched exactly.

    With ``"int8"``, the distance of a query to a row is known from the 8-bit product up to an
    error that has a certain bound (see ``int8.py``). A row is left out only if it is farther
    than ``k`` others whatever the errors, so the search is exact. Products are checked: if one is
    wrong, ``"auto"`` searches again in float32, and ``"int8"`` raises.

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
    _fast_index: Any  # searches a large flat index in place of FAISS

    def __init__(
        self,
        n_neighbors: int = 9,
        *,
        index: str = "flat",
        algorithm: str = "auto",
        nprobe: int | None = None,
        ef_search: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.n_neighbors = n_neighbors
        self.index = index
        self.algorithm = algorithm
        self.nprobe = nprobe
        self.ef_search = ef_search
        self.device = device

    def fit(self, X: Any, y: object = None) -> Self:
        """Fill the bank with ``X``, forgetting what was there.

        Parameters
        ----------
        X : array of shape (N, D), float32
            Embeddings, finite. Other number types are converted.
        y : ignored

        Returns
        -------
        MemoryBank: itself.

        Raises
        ------
        InvalidValueError
            For embeddings of the wrong shape or not finite, an unknown index or algorithm, an
            algorithm or a device that is not to be had here, an ``nprobe`` or ``ef_search``
            that the index does not have, or too few rows to train the index on.
        """
        check_int("n_neighbors", self.n_neighbors, "MemoryBank", low=1)
        check_choice("algorithm", self.algorithm, ALGORITHMS, "MemoryBank")
        check_index(self.index, "MemoryBank", **self._search_parameters())
        if self.algorithm == "int8":
            int8.check_exact("MemoryBank")
        check_device(self.device, "MemoryBank")
        before = self.__dict__.copy()
        try:
            self._store(self._validated(X, reset=True))
        except Exception:  # what was there stays
            self.__dict__ = before
            raise
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
        self._fast_index = None
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
        options: dict[str, Any] = {"random_state": random_state, "device": self.device}
        coreset = select_coreset(self.embeddings_, n, method=method, **options)
        self._store(self.embeddings_[coreset.indices])
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
            Number of neighbours; by default the ``n_neighbors`` of the bank.
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
            If D differs, queries are not finite, more neighbours are wanted than there are, or
            ``algorithm="int8"`` is not to be had here.
        """
        self._check_fitted()
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        check_int("n_neighbors", k, "MemoryBank.kneighbors", low=1, high=len(self.embeddings_))
        X = self._validated(X, reset=False)
        distances, indices = self.search(X, k)
        return (distances, indices) if return_distance else indices

    def search(self, X: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find neighbours without checks: ``X`` must be (Q, D) float32, contiguous."""
        if self.index_ is not None:
            indices = np.asarray(self.index_.search(X, k)[1])
        elif self.device == "cpu" and len(X) * self.embeddings_.size < _MANY:
            indices = np.asarray(faiss.knn(X, self.embeddings_, k)[1])
        else:
            return self._search_large(X, k)
        short = (indices < 0).any(axis=1)  # inverted lists may hold fewer than k
        if short.any():
            indices[short] = _by_faiss(X[short], self.embeddings_, k)
        return self._rank(X, indices)

    def _search_large(self, X: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search a large flat index by the fastest exact method that works here."""
        if self._fast_index is None and self.device != "cpu":
            from anomalib_lite.neighbors.torch_index import TorchIndex  # it needs torch

            self._fast_index = TorchIndex(self.embeddings_, self.device)
        if self._fast_index is None and self._wants_int8(len(X)):
            self._fast_index = Int8Index(self.embeddings_)
        if self._fast_index is None:
            return self._rank(X, _by_faiss(X, self.embeddings_, k))
        if not isinstance(self._fast_index, Int8Index):
            return self._rank(X, self._fast_index.search(X, k))
        try:
            distances, indices = self._fast_index.search(X, k)
        except int8.WrongProductError:  # 8-bit products are not used again in this process
            self._fast_index = None
            return self._search_large(X, k)
        missing = indices[:, 0] < 0  # queries that are too large for it
        if missing.any():
            Q = X[missing]
            distances[missing], indices[missing] = self._rank(Q, _by_faiss(Q, self.embeddings_, k))
        return distances, indices

    def _wants_int8(self, n_queries: int) -> bool:
        if self.algorithm == "int8":  # the bank may come from another machine
            int8.check_exact("MemoryBank")
        much = n_queries * self.embeddings_.size > _VERY_MANY
        return self.algorithm == "int8" or (self.algorithm == "auto" and int8.worthwhile(much))

    def recall(self, X: Any, n_neighbors: int | None = None) -> float:
        """Measure which share of the true nearest neighbours an approximate index finds.

        Parameters
        ----------
        X : array of shape (Q, D), float32
            Queries like those to come.
        n_neighbors : int, optional
            By default the ``n_neighbors`` of the bank.

        Returns
        -------
        float
            Share of the Q * k true neighbours found, 0 to 1; of rows at equal distance any counts.

        Raises
        ------
        NotFittedError, InvalidValueError
            As :meth:`kneighbors`.

        Examples
        --------
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(500, 8)).astype("float32")
        >>> MemoryBank(1, index="IVF16,Flat", nprobe=16).fit(X).recall(X)
        1.0
        """
        distances = self.kneighbors(X, n_neighbors)[0]
        X, k = self._validated(X, reset=False), distances.shape[1]
        true = self._rank(X, _by_faiss(X, self.embeddings_, k))[0]
        return float((distances <= true[:, -1:] * (1 + 1e-6)).mean())

    @classmethod
    def restore(
        cls, embeddings: np.ndarray, serialized_index: np.ndarray | None, **parameters: Any
    ) -> Self:
        """Make a fitted bank from its arrays, with its index as it was trained.

        Parameters
        ----------
        embeddings : array of shape (M, D), float32
        serialized_index : array of shape (n,), uint8, or None
            ``index_`` as FAISS's bytes.
        **parameters
            Arguments of the constructor.

        Raises
        ------
        InvalidValueError
            If the two do not belong together.
        """
        bank = cls(**parameters)
        bank.embeddings_ = check_matrix("embeddings", embeddings, "MemoryBank")
        bank.n_features_in_ = bank.embeddings_.shape[1]
        bank.index_ = bank._fast_index = None
        if (serialized_index is None) != (bank.index == "flat"):
            raise InvalidValueError(f"MemoryBank: no serialized index fits index={bank.index!r}.")
        if serialized_index is not None:
            bank.index_ = faiss_index.deserialize(serialized_index, bank.embeddings_.shape)
        faiss_index.set_search_parameters(
            bank.index_, bank.index, "MemoryBank", **bank._search_parameters()
        )
        return bank

    def _rank(self, X: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute exact distances (Q, k) to the neighbours found, and sort both by distance."""
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

    def _store(self, X: np.ndarray) -> None:
        index = None if self.index == "flat" else faiss_index.build(X, self.index)
        faiss_index.set_search_parameters(
            index, self.index, "MemoryBank", **self._search_parameters()
        )
        self.embeddings_ = X
        self.index_ = index
        self._fast_index = None
        self.__dict__.pop("covering_radius_", None)  # the radius belongs to the previous rows

    def __getstate__(self) -> dict[str, Any]:
        # Another machine may have other instructions, and chooses its own fast index.
        return {**super().__getstate__(), "_fast_index": None}

    def _search_parameters(self) -> dict[str, int | None]:
        return {"nprobe": self.nprobe, "efSearch": self.ef_search}

    def _validated(self, X: Any, *, reset: bool) -> np.ndarray:
        try:
            X = validate_data(self, X, dtype=np.float32, order="C", reset=reset)
        except TypeError as error:
            raise InvalidTypeError(f"MemoryBank: {error}") from error
        except ValueError as error:
            raise InvalidValueError(f"MemoryBank: {error}") from error
        check_values("X", X, "MemoryBank")
        return np.asarray(X)

    def _check_fitted(self) -> None:
        if not hasattr(self, "embeddings_"):
            raise NotFittedError("MemoryBank: the bank is empty. Call fit(X) or add(X) first.")


def _by_faiss(Q: np.ndarray, X: np.ndarray, k: int) -> np.ndarray:
    return np.asarray(faiss.knn(Q, X, k)[1])
