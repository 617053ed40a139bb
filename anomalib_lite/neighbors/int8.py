"""Quantize rows to 8-bit integers whose products have a known error.

Processors multiply 8-bit integers four (AVX-512 VNNI) to eight times (AMX) as fast as 32-bit
floats. With codes ``x' = s * c`` (integers ``c`` in [-127, 127], a step ``s``) and their residual
``e = |x - x'|``, known exactly for every row, Cauchy and Schwarz give

    |q.x - q'.x'| <= e_q |x'| + |q| e_x

A row that the bound excludes is excluded for certain; only the rows that it leaves open are
compared in float32. All of this rests on exact products, which not every processor gives. So
products are checked: once per process with the values that saturate, then by samples.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from itertools import count
from typing import Any

import numpy as np
from scipy.linalg import hadamard

from anomalib_lite._threads import workers
from anomalib_lite.errors import InvalidValueError

__all__ = [
    "QuantizationFrame",
    "QuantizedItems",
    "QuantizedQueries",
    "WrongProductError",
    "check_exact",
    "fault",
    "limit",
    "worthwhile",
    "products",
]

# Products of steps stay far from where float32 ends.
_SHORTEST_STEP = 1e-15
_MOST_BIASES = 64
# Float32 rounding of the norms, of the rotation and of the bound itself, relative to |q| |x|.
_ROUNDING = 2e-5
# Ratio of the largest value to the root mean square above which rows are rotated before they are
# rounded. It is about 3 for rows of a hundred normally distributed values, 4 for a thousand.
_OUTLIERS = 3.8
# Sizes of the products that are checked once per process. Tiles have 1,024 rows, pools 256, and the
# last block any number; codes have a multiple of four columns.
_CHECKED_SIZES = ((1024, 1024), (256, 300), (1024, 1), (1, 1024), (33, 7), (7, 33), (1, 1))
_CHECKED_COLUMNS = (4, 60, 156, 388, 772)
# Of a thread's first products, and later of one in so many multiplications, a few rows and columns
# are computed again.
_ALL_SAMPLED, _WORK_PER_SAMPLE = 3, 2**28
_SAMPLES = 8

_scratch = threading.local()
# All threads count together: most live for one search, and each sample shall be another.
_sample_numbers = count()
# The fault of a product in a search, found although the check at the start had passed.
_seen_wrong: list[str] = []


class WrongProductError(ArithmeticError):
    """A product of 8-bit integers in this process is wrong, so no result may rest on one."""


def worthwhile(much: bool) -> bool:
    """Tell whether 8-bit products save time here and are exact.

    They need torch. Importing it takes seconds, so it is imported only if there is ``much`` work.
    """
    return (much or "torch" in sys.modules) and _is_fast() and fault() is None


def fault() -> str | None:
    """Return what is wrong with the 8-bit products of this process, or None if they are exact.

    The processor's flags cannot tell: an environment variable can keep oneDNN from using them. On
    x86 without VNNI or AMX, oneDNN adds 128 to the codes of one side and adds pairs of products in
    16 bits, which saturate.
    """
    return _seen_wrong[0] if _seen_wrong else _fault_of_patterns()


def check_exact(where: str) -> None:
    """Raise InvalidValueError unless ``algorithm="int8"`` is exact in this process."""
    if (reason := fault()) is not None:
        raise InvalidValueError(
            f"{where}: algorithm='int8' needs exact products of 8-bit integers, as processors with "
            f"VNNI or AMX have them, but here {reason}. Set algorithm='auto', which is exact here "
            "too."
        )


def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply int8 ``a`` (m, K) with the transpose of ``b`` (n, K): (m, n) int32.

    The result is valid until this thread's next call: each thread keeps one buffer, since new
    memory for each result would take a fifth of the time. A sample is computed again of each
    thread's first products, and later of one in 2^28 multiplications, which takes about one percent
    of the time.

    Raises
    ------
    WrongProductError
        If this product, or any before in this process, is not exact.
    """
    if (reason := fault()) is not None:
        raise WrongProductError(reason)
    result = _multiply(a, b)
    _scratch.n_products = n_products = getattr(_scratch, "n_products", 0) + 1
    _scratch.unchecked = work = getattr(_scratch, "unchecked", 0) + result.size * a.shape[1]
    if n_products <= _ALL_SAMPLED or work >= _WORK_PER_SAMPLE:
        _scratch.unchecked = 0
        if (reason := _fault_of_sample(a, b, result)) is not None:
            _seen_wrong.append(reason)
            raise WrongProductError(reason)
    return result


def _fault_of_sample(a: np.ndarray, b: np.ndarray, result: np.ndarray) -> str | None:
    """Compute a few rows and columns of a product again, other ones each time."""
    n = next(_sample_numbers)
    row_step, column_step = -(-len(a) // _SAMPLES), -(-len(b) // _SAMPLES)
    rows = slice(n % row_step, None, row_step)
    columns = slice(37 * n % column_step, None, column_step)
    return _difference(result[rows, columns], _exact_product(a[rows], b[columns]))


@cache
def _is_fast() -> bool:
    """Tell whether 8-bit products take less time on this processor than float32 ones."""
    import torch

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    in_hardware = any(capabilities.get(k) for k in ("avx512_vnni", "amx_int8"))
    return in_hardware and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@cache
def _fault_of_patterns() -> str | None:
    """Check products of codes that saturate 16-bit sums, in threads as a search uses them."""
    import torch  # noqa: F401, workers() limits its threads only if it is there

    sizes = [(m, n, k) for k in _CHECKED_COLUMNS for m, n in _CHECKED_SIZES]
    try:
        with workers() as executor:
            reasons = list(executor.map(lambda size: _fault_of_size(*size), sizes))
    except (AttributeError, RuntimeError) as error:
        return f"torch._int_mm fails ({error})"
    return next((reason for reason in reasons if reason is not None), None)


def _fault_of_size(m: int, n: int, n_columns: int) -> str | None:
    """Check one size with the largest codes in all combinations of signs, and with random codes."""
    random = np.random.default_rng(0)
    largest = (127, -127)
    pairs = [[first, second] for first in largest for second in largest]
    patterns = np.concatenate(
        [
            np.tile(pairs, n_columns // 2),
            random.choice(largest, (5, n_columns)),
            random.integers(-127, 128, (8, n_columns)),
        ]
    ).astype(np.int8)
    # Rows repeat; 17 is a prime, so each pattern comes to each place of a kernel.
    left, right = np.arange(m) % len(patterns), np.arange(n) % len(patterns)
    expected = _exact_product(patterns, patterns).astype(np.int32)
    return _difference(_multiply(patterns[left], patterns[right]), expected[np.ix_(left, right)])


def _exact_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute ``a @ b.T`` in float64, which holds every such sum exactly."""
    return np.asarray(a.astype(np.float64) @ b.T.astype(np.float64))


def _difference(got: np.ndarray, expected: np.ndarray) -> str | None:
    wrong = got != expected
    if not wrong.any():
        return None
    return f"torch._int_mm gives {got[wrong][0]} where {int(expected[wrong][0])} is right"


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    import torch

    out: np.ndarray | None = getattr(_scratch, "out", None)
    if out is None or len(out) < len(a) * len(b):
        out = _scratch.out = np.empty(len(a) * len(b), np.int32)
    result = out[: len(a) * len(b)].reshape(len(a), len(b))
    torch._int_mm(torch.from_numpy(a), torch.from_numpy(b).T, out=torch.from_numpy(result))
    return result


def limit(least: np.ndarray, queries: QuantizedQueries, items: QuantizedItems) -> np.ndarray:
    """Return the smallest product (n,) int32 of an item whose score may reach ``least`` (n,).

    An item with a smaller product has a lower score, for certain.
    """
    scale = queries.steps * np.float32(items.step)
    # One less, since float32 rounds.
    lowest = np.floor((least - np.float32(items.shift) - items.error(queries)) / scale) - 1
    # A float32 next to the largest int32; what does not fit is never reached.
    lowest = np.where(queries.fits, np.clip(lowest, -(2.0**31), 2.0**31 - 129), 2.0**31 - 129)
    return lowest.astype(np.int32)


@dataclass(frozen=True)
class QuantizedQueries:
    """Quantized rows (n, D) for the left side of a product, each with a step of its own."""

    codes: np.ndarray  # (n, K) int8, the last columns being weights for the items' biases
    steps: np.ndarray  # (n,)
    norms: np.ndarray  # (n,)
    residuals: np.ndarray  # (n,)
    fits: np.ndarray  # (n,) bool: False where a row is so large that its codes say nothing

    def take(self, rows: slice | np.ndarray) -> QuantizedQueries:
        """Select rows."""
        return QuantizedQueries(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def join(cls, parts: Iterable[QuantizedQueries]) -> QuantizedQueries:
        """Concatenate the rows of several."""
        listed = list(parts)
        return cls(*(np.concatenate([getattr(p, f.name) for p in listed]) for f in fields(cls)))


@dataclass(frozen=True)
class QuantizedItems:
    """Quantized rows (m, D) for the right side of a product, all with one step.

    A product times both steps, plus ``shift``, approximates the score ``q.x - |x|^2 / 2``, which is
    largest for the nearest item.
    """

    codes: np.ndarray  # (m, K) int8
    step: float
    shift: float
    norm: float  # the largest
    residual: float  # the largest
    unit: float  # what one unit of bias is worth

    def error(self, queries: QuantizedQueries) -> np.ndarray:
        """Bound, per query, the error (n,) of a score."""
        error = queries.residuals * np.float32(self.norm + self.residual)
        error += queries.norms * np.float32(self.residual + _ROUNDING * self.norm)
        error += np.float32(self.unit / 2 + _ROUNDING * self.norm**2)
        return error


class QuantizationFrame:
    """The centre and the rotation that rows are quantized in; distances stay the same.

    Centring makes norms small. If a few channels are far larger than the others, as in vision
    transformers, they would take the whole range of the integers: a fixed random rotation spreads
    them. It is a Kronecker product of two matrices, so it takes ``a + b`` multiplications per
    value, not ``D = a b``.

    Parameters
    ----------
    X : ndarray of shape (N, D), float32
        Typical rows.
    """

    def __init__(self, X: np.ndarray) -> None:
        self.mean = X.mean(axis=0, dtype=np.float64).astype(np.float32)  # (D,)
        sample = X[:: max(1, len(X) // 1024)] - self.mean
        largest = np.abs(sample).max(axis=1)
        rms = np.sqrt(np.einsum("nd,nd->n", sample, sample) / X.shape[1])
        self.rotation: tuple[np.ndarray, np.ndarray] | None = None
        if np.median(largest / np.maximum(rms, np.finfo(np.float32).tiny)) > _OUTLIERS:
            b = next((b for b in (128, 64) if X.shape[1] % b == 0), 32)
            random = np.random.default_rng(0)
            # A Hadamard matrix spreads a single large value evenly; random signs keep several
            # large values from adding up.
            right = hadamard(b) * (random.choice([-1, 1], (b, 1)) / b**0.5)
            left = np.linalg.qr(random.normal(size=[-(-X.shape[1] // b)] * 2))[0]
            self.rotation = (left.astype(np.float32), right.astype(np.float32))
            largest = np.abs(self.transform(sample + self.mean)).max(axis=1)
        # Queries are rounded in steps of this or more. Small enough for most rows to keep theirs.
        self.smallest_step = max(0.75 * float(np.median(largest)) / 127, _SHORTEST_STEP)
        self.n_biases = 0

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Centre and rotate rows (n, D): (n, D or a little more), float32."""
        return self.rotate(X - self.mean)

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Rotate rows (n, D) that are centred already."""
        if self.rotation is None:
            return x
        left, right = self.rotation
        padded = np.zeros((len(x), len(left) * len(right)), np.float32)
        padded[:, : x.shape[1]] = x
        turned = padded.reshape(-1, len(right)) @ right
        np.matmul(
            left, turned.reshape(len(x), len(left), -1), out=padded.reshape(len(x), len(left), -1)
        )
        return padded

    def reserve_bias_columns(self, half_range: float, step: float) -> None:
        """Reserve columns for biases up to ``half_range``, of items with this ``step``.

        Items that need more columns get a longer step instead.
        """
        needed = half_range / (127 * self._unit(max(step, _SHORTEST_STEP)))
        self.n_biases = int(min(needed, _MOST_BIASES, len(self.mean) / 16)) + 1

    def queries(self, x: np.ndarray) -> QuantizedQueries:
        """Quantize rows from :meth:`transform` as queries."""
        step = np.maximum(np.abs(x).max(axis=1) / 127, self.smallest_step)
        weights = np.floor(127 * self.smallest_step / step)  # of the biases, an integer
        fits = weights > 0
        weights = np.maximum(weights, 1)
        step = (127 * self.smallest_step / weights).astype(np.float32)
        codes = self._round(x, step[:, None])
        codes[:, x.shape[1] : x.shape[1] + self.n_biases] = weights[:, None]
        return QuantizedQueries(codes, step, _norms(x), _residuals(x, codes, step[:, None]), fits)

    def items(self, x: np.ndarray) -> QuantizedItems:
        """Quantize rows from :meth:`transform` as items."""
        half = _norms(x) ** 2 / 2
        shift = float(half.min() + half.max()) / 2
        # Long enough for the values, and for the biases to fit into their columns.
        shortest = float(np.ptp(half)) / 2 / (127 * self.n_biases * self._unit(1))
        step = np.float32(max(float(np.abs(x).max()) / 127, shortest, _SHORTEST_STEP))
        codes = self._round(x, step)
        unit = self._unit(float(step))
        bias = np.rint((shift - half) / unit).astype(np.int64)
        share, rest = np.divmod(bias, self.n_biases)
        columns = codes[:, x.shape[1] : x.shape[1] + self.n_biases]
        columns[:] = share[:, None] + (np.arange(self.n_biases) < rest[:, None])
        residual = float(_residuals(x, codes, step).max())
        norm = float(np.sqrt(2 * half.max()))
        return QuantizedItems(codes, float(step), -shift, norm, residual, unit)

    def _unit(self, step: float) -> float:
        return 127 * self.smallest_step * step

    def _round(self, x: np.ndarray, step: np.ndarray | np.float32) -> np.ndarray:
        """Round to codes, with columns for the biases, padded to a multiple of four."""
        n_columns = -(-(x.shape[1] + self.n_biases) // 4) * 4
        codes = np.zeros((len(x), n_columns), np.int8)
        scaled = x / step
        np.rint(scaled, out=scaled)
        np.clip(scaled, -127, 127, out=scaled)
        codes[:, : x.shape[1]] = scaled
        return codes


def _norms(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(np.einsum("nd,nd->n", x, x)))


def _residuals(x: np.ndarray, codes: np.ndarray, step: np.ndarray | np.float32) -> np.ndarray:
    rounded = codes[:, : x.shape[1]].astype(np.float32)
    rounded *= step
    rounded -= x
    return _norms(rounded)
