"""A LoRA adapter: low-rank matrices that are added to the weights of a frozen network."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anomalib_lite.errors import InvalidValueError

__all__ = ["Adapter"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank updates of some of a network's linear layers.

    Attributes
    ----------
    factors : dict of str to (A, B)
        For the name of each adapted layer with weights W of shape (m, n): A (rank, n) and
        B (m, rank), both float32. The adapted layer has the weights W + B A: B includes the
        factor ``alpha / rank`` and the share of the update that is kept.
    rank : int
        Rank of the update.
    alpha : float
        Scale of the update in training.
    history : list of dict
        ``validation_auroc`` on synthetic anomalies, first without the adapter, then after each
        epoch, with its ``train_loss``. The factors are those of the best entry; there are none if
        that is the first.
    """

    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    rank: int
    alpha: float
    history: list[dict[str, float]] = field(default_factory=list)

    def sha256(self) -> str:
        """SHA-256 over the names and the factors."""
        digest = hashlib.sha256()
        for name, factors in sorted(self.factors.items()):
            for factor in factors:
                digest.update(f"{name} {factor.shape}".encode())
                digest.update(np.ascontiguousarray(factor).tobytes())
        return digest.hexdigest()

    def add_to(self, network: Any, where: str) -> None:
        """Add the updates to the weights of a ``torch.nn.Module``.

        Raises
        ------
        InvalidValueError
            If the network lacks one of the layers, or the layer has another shape.
        """
        for name, (A, B) in self.factors.items():
            try:
                weight = network.get_submodule(name).weight.data
                weight.copy_(weight + weight.new_tensor(B @ A).reshape(weight.shape))
            except (AttributeError, RuntimeError) as error:
                raise InvalidValueError(
                    f"{where}: the adapter was trained for another backbone: {name}: {error}. Use "
                    "the one that it was trained with."
                ) from error

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the factors by one name each, and the attributes that JSON can hold."""
        arrays = {
            f"{name}.{letter}": factor
            for name, factors in self.factors.items()
            for letter, factor in zip("AB", factors, strict=True)
        }
        return arrays, {"rank": self.rank, "alpha": self.alpha, "history": self.history}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> Adapter:
        """Restore an adapter from :meth:`to_arrays`.

        Raises
        ------
        KeyError, ValueError
            If a factor is missing or the shapes do not fit.
        """
        names = sorted({name.rpartition(".")[0] for name in arrays})
        factors = {name: (arrays[f"{name}.A"], arrays[f"{name}.B"]) for name in names}
        for name, (A, B) in factors.items():
            if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
                raise ValueError(f"adapter of {name} has shapes {A.shape} and {B.shape}")
        return cls(factors, int(state["rank"]), float(state["alpha"]), list(state["history"]))
