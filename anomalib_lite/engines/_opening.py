"""A backbone and the name of an engine -> an object that embeds images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from anomalib_lite._device import DTYPES
from anomalib_lite._validation import check_choice
from anomalib_lite.engines._compiled import CompiledBackbone, compile_backbone, refusal
from anomalib_lite.errors import AnomalibLiteError, InvalidValueError
from anomalib_lite.fusion import STRATEGIES
from anomalib_lite.networks.adapter import Adapter

if TYPE_CHECKING:  # torch takes seconds to import, and a cached graph does not need it
    from anomalib_lite.backbones import Backbone

__all__ = ["ENGINES", "FUSIONS", "AnyBackbone", "open_backbone", "opening_backbones"]

AnyBackbone: TypeAlias = "Backbone | CompiledBackbone"

ENGINES = ("auto", "torch", "openvino", "onnxruntime")
FUSIONS = tuple(STRATEGIES)

_Opener: TypeAlias = "Callable[[Callable[[], AnyBackbone], dict[str, Any]], Any]"
_OPENER: ContextVar[_Opener | None] = ContextVar("opener", default=None)


def open_backbone(
    backbone: Any,
    *,
    weights: str | Path | None = None,
    layers: Sequence[str | int] | None = None,
    strides: Sequence[int] = (8, 16),
    fusion: str = "concat",
    device: Any = "auto",
    dtype: str = "auto",
    engine: str = "auto",
    scales: Sequence[float] = (1.0,),
    attention: bool = False,
    adapter: Adapter | None = None,
    state: Mapping[str, Any] | None = None,
    sha256: str | None = None,
    where: str = "open_backbone",
) -> AnyBackbone:
    """Open a frozen network with its fusion in the engine that is asked for.

    Parameters
    ----------
    backbone, weights, layers, strides, fusion, device, dtype, scales, attention, adapter, state, \
where
        The same as those of :class:`~anomalib_lite.backbones.Backbone`.
    engine : {"auto", "torch", "openvino", "onnxruntime"}, default="auto"
        ``"auto"`` is OpenVINO if it is installed, the device is the CPU, and OpenVINO can run
        the network in this number type; else torch. Attribute ``engine`` says which one it is.
    sha256 : str, optional
        Hash of the weights, if it is known: a cached graph is then found without the weights.

    Returns
    -------
    Backbone or CompiledBackbone
        Both have ``embed``, which takes pixels (B, H, W, 3), uint8 or float32 in [0, 1], and gives
        embeddings (B, h, w, D) float32; and ``layers``, ``stride``, ``channels``, ``mean``,
        ``std``, ``sha256``, ``device``, ``dtype`` and ``engine``.

    Raises
    ------
    MissingDependencyError
        If an engine is asked for by name and is not installed.
    InvalidValueError
        If an engine is asked for by name and cannot run this network, on this device or in this
        number type; and for the reasons that ``Backbone`` gives.

    Examples
    --------
    >>> import numpy as np
    >>> backbone = open_backbone("efficientnet_lite0", engine="torch", device="cpu")
    >>> backbone.embed(np.zeros((2, 64, 96, 3), np.uint8)).shape
    (2, 8, 12, 152)
    >>> backbone.engine
    'torch'
    """
    check_choice("engine", engine, ENGINES, where)
    arguments: dict[str, Any] = {
        "weights": weights,
        "layers": layers,
        "strides": tuple(strides),
        "fusion": fusion,
        "dtype": dtype,
        "adapter": adapter,
        "state": state,
        "where": where,
    }
    more: dict[str, Any] = {"device": device, "scales": tuple(scales), "attention": attention}
    opener, open_it = _OPENER.get(), partial(_open, backbone, engine, sha256, arguments, **more)
    if opener is None:
        return open_it()
    opened: AnyBackbone = opener(
        open_it, {"backbone": backbone, "engine": engine, **arguments, **more}
    )
    return opened


def _open(
    backbone: Any,
    engine: str,
    sha256: str | None,
    arguments: dict[str, Any],
    *,
    device: Any,
    scales: tuple[float, ...],
    attention: bool,
) -> AnyBackbone:
    if engine != "torch":
        check_choice("dtype", arguments["dtype"], DTYPES, arguments["where"])
        one_pass = scales == (1.0,) and not attention
        compiled = _open_compiled(backbone, engine, device, one_pass, sha256, arguments)
        if compiled is not None:
            return compiled
    from anomalib_lite.backbones import Backbone

    return Backbone(backbone, device=device, scales=scales, attention=attention, **arguments)


@contextmanager
def opening_backbones(opener: _Opener) -> Iterator[None]:
    """Let a function open every backbone in the block, also those that detectors open.

    Parameters
    ----------
    opener : callable
        Takes a function without arguments that opens the backbone, and a dict of the arguments of
        :func:`open_backbone`. Returns what is used: the backbone, or an object with the same
        attributes and methods. Blocks may be nested: the inner one counts.

    Notes
    -----
    It holds for the thread that entered the block. Worker processes of ``n_jobs`` open theirs
    without it. A detector that was fitted in the block keeps what it got. Backbones of torch may
    be changed by who opened them (LoRA), so do not hand one out twice.

    Examples
    --------
    >>> opened = []
    >>> def note(open_it, arguments):
    ...     opened.append(arguments["backbone"])
    ...     return open_it()
    >>> with opening_backbones(note):
    ...     _ = open_backbone("efficientnet_lite0", engine="torch", device="cpu")
    >>> opened
    ['efficientnet_lite0']
    """
    token = _OPENER.set(opener)
    try:
        yield
    finally:
        _OPENER.reset(token)


def _open_compiled(
    backbone: Any,
    engine: str,
    device: Any,
    one_pass: bool,
    sha256: str | None,
    arguments: dict[str, Any],
) -> CompiledBackbone | None:
    """Open a network in an engine other than torch; None if ``"auto"`` must be torch."""
    name, where = "openvino" if engine == "auto" else engine, arguments["where"]
    reason: AnomalibLiteError | None
    if one_pass:
        reason = refusal(name, device, where)
    else:
        reason = InvalidValueError(
            f"{where}: engine={name!r} can do neither multi_scale nor attention_guided. "
            "Use engine='auto' or 'torch'."
        )
    if reason is None:
        compiled = compile_backbone(backbone, name, sha256=sha256, **arguments)
        if isinstance(compiled, CompiledBackbone):
            return compiled
        reason = compiled
    if engine == "auto":
        return None
    raise reason
