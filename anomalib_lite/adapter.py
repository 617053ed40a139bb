"""What LoRA has learned: small matrices that are added to weights of a frozen network."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anomalib_lite.errors import InvalidValueError

__all__ = ["Adapter"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank changes of some of a network's linear layers.

    Attributes
    ----------
    factors : dict of str to (A, B)
        By the name of a layer with weights W of shape (m, n): A (rank, n) and B (m, rank),
        both float32. The adapted layer has the weights W + B A: ``alpha / rank`` is in B, and
        so is the share of what was learned that is kept.
    rank : int
    alpha : float
    history : list of dict
        ``validation_auroc`` on synthetic anomalies, first without the adapter, then after each
        epoch, with its ``train_loss``. The factors are those of the best; none, if that is the
        first.
    """

    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    rank: int
    alpha: float
    history: list[dict[str, float]] = field(default_factory=list)

    def sha256(self) -> str:
        """Of the names and the factors: tells this adapter from others."""
        digest = hashlib.sha256()
        for name, factors in sorted(self.factors.items()):
            for factor in factors:
                digest.update(f"{name} {factor.shape}".encode())
                digest.update(np.ascontiguousarray(factor).tobytes())
        return digest.hexdigest()

    def add_to(self, network: Any, where: str) -> None:
        """Add them to the weights of a ``torch.nn.Module``.

        Raises
        ------
        InvalidValueError
            If it lacks one of the layers, or has it in another shape.
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
        """The factors by one name each, and what JSON can hold."""
        arrays = {
            f"{name}.{letter}": factor
            for name, factors in self.factors.items()
            for letter, factor in zip("AB", factors, strict=True)
        }
        return arrays, {"rank": self.rank, "alpha": self.alpha, "history": self.history}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> Adapter:
        """What :meth:`to_arrays` took apart; KeyError or ValueError where a part is missing."""
        names = sorted({name.rpartition(".")[0] for name in arrays})
        factors = {name: (arrays[f"{name}.A"], arrays[f"{name}.B"]) for name in names}
        for name, (A, B) in factors.items():
            if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
                raise ValueError(f"adapter of {name} has shapes {A.shape} and {B.shape}")
        return cls(factors, int(state["rank"]), float(state["alpha"]), list(state["history"]))
