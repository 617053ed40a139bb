"""Base of the estimators on plain rows that are fitted from running moments."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from anomalib_lite._validation import check_values
from anomalib_lite.errors import InvalidTypeError, InvalidValueError, NotFittedError
from anomalib_lite.gaussian._moments import Moments

__all__ = ["MomentsEstimator"]


class MomentsEstimator(BaseEstimator, metaclass=ABCMeta):
    """Base of scikit-learn estimators that are fitted from the moments of rows.

    A subclass supplies :meth:`_learn`, which takes over moments, and :meth:`_solve`, which computes
    from them what takes long or may fail.
    """

    moments_: Moments

    def fit(self, X: Any, y: object = None) -> Self:
        """Fit to rows; what was fitted before is forgotten.

        Parameters
        ----------
        X : array of shape (N, D), any float type
            Normal embeddings, at least 2.
        y : ignored

        Returns
        -------
        Self
            This object; after an error it is as before.

        Raises
        ------
        InvalidTypeError
            If ``X`` is no array of numbers.
        InvalidValueError
            If a parameter cannot be used, if ``X`` has another shape or holds a number that is not
            finite, or if the rows are so few or so similar that the model cannot be fitted: no
            inverse of the covariance, or fewer directions than components asked for.

        Examples
        --------
        >>> import numpy as np
        >>> from anomalib_lite.gaussian import Gaussian
        >>> Gaussian(shrinkage=0.0).fit(np.float32([[0, 0], [2, 0], [0, 2], [2, 2]])).location_
        array([1., 1.])
        """
        before = self.__dict__.copy()
        try:
            X = self._validated(X, reset=True, at_least=2)
            moments = Moments(X.shape[1])
            moments.add(X)
            self.fit_moments(moments)
        except Exception:  # a failed fit changes nothing
            self.__dict__ = before
            raise
        return self

    def partial_fit(self, X: Any, y: object = None) -> Self:
        """Update the fit with further rows; the first call begins a new fit.

        Parameters
        ----------
        X : array of shape (N, D), any float type
            Further normal embeddings; one row is enough. D is that of the earlier rows.
        y : ignored

        Returns
        -------
        Self
            This object, equal up to rounding to a fit on all rows at once.

        Raises
        ------
        InvalidTypeError, InvalidValueError
            As :meth:`fit`. But rows that are still too few or too similar are no error here; they
            are one when the model is first used.

        Examples
        --------
        >>> import numpy as np
        >>> from anomalib_lite.gaussian import Gaussian
        >>> X = np.random.default_rng(0).normal(size=(60, 3))
        >>> in_blocks = Gaussian()
        >>> for block in np.split(X, 4):
        ...     in_blocks = in_blocks.partial_fit(block)
        >>> bool(np.allclose(in_blocks.covariance_, Gaussian().fit(X).covariance_))
        True
        """
        known = getattr(self, "moments_", None)
        X = self._validated(X, reset=known is None)
        moments = Moments(X.shape[1])
        if known is not None:
            moments.merge(known)
        moments.add(X)
        self._learn(moments)
        return self

    def fit_moments(self, moments: Moments) -> Self:
        """Fit as :meth:`fit` does, but from the moments of rows that are no longer needed.

        Parameters
        ----------
        moments : Moments
            Moments of the rows; they are kept, not copied.

        Returns
        -------
        Self
            This object.

        Raises
        ------
        InvalidValueError
            If a parameter cannot be used, or the rows are too few or too similar, as in
            :meth:`fit`.

        Examples
        --------
        >>> import numpy as np
        >>> from anomalib_lite.gaussian import Gaussian, Moments
        >>> X = np.random.default_rng(0).normal(size=(60, 3))
        >>> moments = Moments(3)
        >>> moments.add(X)
        >>> fitted = Gaussian().fit_moments(moments)
        >>> bool(np.allclose(fitted.mahalanobis(X), Gaussian().fit(X).mahalanobis(X)))
        True
        """
        self._learn(moments)
        self._solve()
        return self

    @abstractmethod
    def _learn(self, moments: Moments) -> None:
        """Check the parameters, and take over the moments as those of this fit."""

    @abstractmethod
    def _solve(self) -> None:
        """Compute what is needed to measure distances; InvalidValueError if that is impossible."""

    def _check_fitted(self) -> None:
        try:
            check_is_fitted(self, "moments_")
        except ValueError as error:
            name = type(self).__name__
            raise NotFittedError(f"{name}: not fitted yet. Call fit(X) first.") from error

    def _validated(self, X: Any, *, reset: bool, at_least: int = 1) -> np.ndarray:
        name = type(self).__name__
        try:
            X = validate_data(
                self,
                X,
                dtype=[np.float64, np.float32],
                reset=reset,
                ensure_min_samples=at_least,
            )
        except TypeError as error:
            raise InvalidTypeError(f"{name}: {error}") from error
        except ValueError as error:
            raise InvalidValueError(f"{name}: {error}") from error
        check_values("X", X, name)
        return np.asarray(X)
