"""Normal images -> small changes of a vision transformer that make defects stand out.

Low-rank adaptation [1]_ of the attention: the network learns to tell patches of normal images
from those of synthetic anomalies, while its own weights stay as they are.

References
----------
.. [1] Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen, "LoRA: Low-rank adaptation of large
   language models", ICLR 2022, arXiv:2106.09685.
.. [2] Wortsman, Ilharco, Kim, Li, Kornblith, Roelofs, Gontijo Lopes, Hajishirzi, Farhadi, Namkoong
   and Schmidt, "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv:2109.01903.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from anomalib_lite._validation import check_int, check_number
from anomalib_lite.adapter import Adapter
from anomalib_lite.backbones import Backbone
from anomalib_lite.errors import InvalidValueError, MissingDependencyError
from anomalib_lite.gaussian import Moments
from anomalib_lite.images import ImageSource, iter_batches
from anomalib_lite.lora._task import Example, Task, batches_of, features_of
from anomalib_lite.synthetic import SyntheticAnomalies

__all__ = ["Adapter", "adaptive_rank", "train_adapter"]

# Images to learn from, drawn at random where there are more: they are held in memory.
MOST_IMAGES = 512
# How far to go from the network as it was to what has been learned: real defects are not quite the
# synthetic ones, and the way between the two serves both.
SHARE = 0.3
# Synthetic anomalies made of each validation image.
_ANOMALIES_TO_VALIDATE = 3
_BATCH = 16
_PATIENCE = 3
_WEIGHT_DECAY = 0.01
_FEWEST = 4


def train_adapter(
    backbone: Backbone,
    source: ImageSource,
    *,
    image_size: int | tuple[int, int],
    rank: int | str = 16,
    alpha: float | None = None,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    shrinkage: str | float = "ledoit_wolf",
    normalize: bool = True,
    dtype: str = "auto",
    on_error: str = "raise",
    random: np.random.RandomState | None = None,
    verbose: int = 0,
) -> Adapter:
    """Adapt the attention of a vision transformer to normal images, against synthetic anomalies.

    Parameters
    ----------
    backbone : Backbone
        In float32, with ``fusion="summary"``. Its network takes on what is learned: give one that
        nobody else uses.
    source : ImageSource
        Normal images, at least 4. A fifth is kept for validation.
    image_size : int or (height, width)
        As the detector has it.
    rank : int or "adaptive", default=16
        Of the changes; ``"adaptive"`` asks :func:`adaptive_rank`.
    alpha : float, optional
        The changes are multiplied by ``alpha / rank``; 2 ``rank`` by default.
    epochs : int, default=10
        At most; ended after 3 without a better result on the validation images.
    learning_rate : float, default=1e-3
        Of AdamW.
    shrinkage, normalize
        Of the Gaussians, and whether features are divided by their length: as the detector has
        them.
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        What the network computes in; anything but float32 means mixed precision in bfloat16.
    on_error : {"raise", "skip"}, default="raise"
        Whether an image that cannot be read ends everything or is left out.
    random : RandomState, optional
        Draws images, anomalies and first weights.
    verbose : int, default=0
        Above 0, a progress bar in a terminal.

    Returns
    -------
    Adapter
        Of the epoch with the best validation; of none, without any change, if all were worse than
        the network as it was.

    Raises
    ------
    MissingDependencyError
        If peft is not installed.
    InvalidValueError
        If the backbone is of another kind, its attention does not use linear layers as modules,
        there are fewer than 4 images, or they are too much alike.

    Notes
    -----
    Features f are those that the Gaussians will see (at full size, where a detector is to see
    several scales). They are whitened by the Gaussian
    of normal ones before anything was learned, :math:`w = L^T (f - \\mu)` with
    :math:`L L^T = \\Sigma^{-1}`, so that :math:`m = |w|^2 / d` is the squared Mahalanobis
    distance by dimension. A head, D -> 512 -> 256 -> 1, gives each patch a logit z from w,
    another of its shape each image. Of both z and m, a confidence is learned,

    .. math:: \\sigma(z / T), \\quad \\sigma(a (m - b)),

    with the temperature T = 2 and learned a and b. The loss of each is its cross-entropy with the
    labels, those of patches from the anomalies' masks, and classes weighing the same:

    .. math:: - \\tfrac{1}{2} E_{y = 0} \\log(1 - \\sigma) - \\tfrac{1}{2} E_{y = 1} \\log \\sigma

    The whole is half the sum of these four, and 0.1 times the mean of :math:`|w - w_0|^2 / d` over
    normal patches and normal images, where w_0 is without the adapter. Each epoch has new
    anomalies, as many as normal images. The heads are thrown away.

    For validation, the Gaussians are fitted anew on the features of the training images, and
    distances of synthetic anomalies compared with those of normal images: the mean of the AUROC of
    patches and that of images counts.

    Of the changes that were learned, a share of 0.3 is kept: weights between those of a network
    and those that were tuned lose less on what the tuning has not seen [2]_.
    """
    where = backbone.where
    check_peft(where)
    check_int("epochs", epochs, where, low=1)
    check_number("learning_rate", learning_rate, where, "(0, 1)")
    if backbone.fusion != "summary" or backbone.dtype != torch.float32:
        raise InvalidValueError(
            f"{where}: an adapter is trained on a Backbone with fusion='summary' and "
            f"dtype='float32', got {backbone.fusion!r} and {backbone.dtype}."
        )
    random = np.random.RandomState() if random is None else random
    names = _attention_layers(backbone)
    images = _load(source, image_size, backbone.stride, on_error, random)
    if len(images) < _FEWEST:
        raise InvalidValueError(
            f"{where}: {len(images)} images are too few to adapt to; give at least {_FEWEST}, "
            "beside those held back for calibration, or adapt=None."
        )
    n_validation = max(1, len(images) // 5)
    validation, train = images[:n_validation], images[n_validation:]
    rank = adaptive_rank(backbone, train) if rank == "adaptive" else rank
    rank = check_int("rank", rank, where, low=1)
    alpha = check_number("alpha", 2 * rank if alpha is None else alpha, where, "(0, inf)")
    to_fit = [Example.normal(image) for image in train]
    to_validate = [Example.normal(image) for image in validation] + list(
        _anomalies(validation, _ANOMALIES_TO_VALIDATE * n_validation, random)
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(random.randint(2**31))
        _put_lora_into(backbone.network, names, rank, alpha)
        task = Task(backbone, names, to_fit, shrinkage=shrinkage, normalize=normalize, dtype=dtype)
    learned = [p for p in [*backbone.network.parameters(), *task.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    history: list[dict[str, float]] = [{"validation_auroc": task.validate(to_fit, to_validate)}]
    best: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    quiet = None if verbose else True
    for epoch in tqdm(range(1, epochs + 1), "adapt", unit="epoch", leave=False, disable=quiet):
        losses: list[float] = []
        for batch in batches_of([*to_fit, *_anomalies(train, len(train), random)], random):
            loss = task.loss(batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if epoch == 1 and not losses:
                _check_gradients(backbone, names)
            optimizer.step()
            losses.append(loss.item())
        area = task.validate(to_fit, to_validate)
        history.append({"train_loss": float(np.mean(losses)), "validation_auroc": area})
        best_epoch = int(np.argmax([h["validation_auroc"] for h in history]))
        if best_epoch == epoch:
            best = {n: _factors(backbone.network.get_submodule(n)) for n in names}
        elif epoch - best_epoch >= _PATIENCE:
            break
    # Layers behind the last one that is asked for have learned nothing.
    factors = {name: (A, np.float32(SHARE) * B) for name, (A, B) in best.items() if B.any()}
    return Adapter(factors, rank, alpha, history)


def check_peft(where: str) -> None:
    """Raise MissingDependencyError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError(
            f"{where}: adapt='lora' needs peft, which is not installed. Install it with: "
            "pip install 'anomalib-lite[lora]', or use adapt=None."
        )


def adaptive_rank(backbone: Backbone, images: Sequence[np.ndarray]) -> int:
    """As many directions as the patches of normal images take up: a power of two, 4 to 64.

    Parameters
    ----------
    backbone : Backbone
        With ``fusion="summary"``.
    images : sequence of arrays (H, W, 3), uint8
        In the size of the backbone.

    Returns
    -------
    int
        The power of two nearest to the participation ratio
        :math:`(\\sum_i \\lambda_i)^2 / \\sum_i \\lambda_i^2` of the eigenvalues of their
        covariance.
    """
    moments: Moments | None = None
    with torch.no_grad():
        for image in images:
            X = features_of(backbone, image[None])[0].flatten(0, 2).cpu().numpy()
            moments = moments or Moments(X.shape[1])
            moments.add(X)
    assert moments is not None
    ratio = np.trace(moments.scatter) ** 2 / np.square(moments.scatter).sum()
    return int(2 ** np.clip(np.rint(np.log2(ratio)), 2, 6))


def _anomalies(
    images: Sequence[np.ndarray], n: int, random: np.random.RandomState
) -> Iterator[Example]:
    for made in SyntheticAnomalies(random_state=random).iterate(images, n):
        yield Example(made.image, made.mask)


def _load(
    source: ImageSource,
    image_size: int | tuple[int, int],
    stride: int,
    on_error: str,
    random: np.random.RandomState,
) -> list[np.ndarray]:
    """Images as the network takes them, uint8."""
    chosen = random.permutation(len(source))[:MOST_IMAGES]
    images: dict[int, np.ndarray] = {}
    for batch in iter_batches(
        source.take(chosen),
        image_size=image_size,
        stride=stride,
        batch_size=_BATCH,
        on_error=on_error,
    ):
        pixels = batch.pixels
        if pixels.dtype != np.uint8:
            pixels = np.rint(255 * pixels).astype(np.uint8)
        images.update(zip(batch.indices, pixels, strict=True))
    return [images[i] for i in sorted(images)]


def _attention_layers(backbone: Backbone) -> list[str]:
    """Names of the linear layers of the attention."""
    names = [
        name
        for name, module in backbone.network.named_modules()
        if isinstance(module, nn.Linear)
        and f".{name}".split(".")[-2].endswith(("attn", "attention"))
    ]
    if not names:
        raise InvalidValueError(
            f"{backbone.where}: adapt='lora' adapts the attention of a vision transformer, and "
            f"this backbone ({type(backbone.network).__name__}) has none. Use another, such as "
            "'vit_small_patch14_dinov2.lvd142m', or adapt=None."
        )
    return names


def _put_lora_into(network: nn.Module, names: list[str], rank: int, alpha: float) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)  # type: ignore[arg-type]
    inject_adapter_in_model(config, network)


def _check_gradients(backbone: Backbone, names: list[str]) -> None:
    """Some networks read a layer's weights past the layer: what is put into it has no effect."""
    order = [name for name, _ in backbone.network.named_modules()]
    used = [i for i, name in enumerate(order) if name.startswith(tuple(backbone.layers))]
    end = max(used, default=len(order))
    for name in names:
        B = backbone.network.get_submodule(f"{name}.lora_B.default").weight
        if order.index(name) <= end and B.grad is None:
            raise InvalidValueError(
                f"{backbone.where}: adapt='lora' cannot change {name!r} of this backbone "
                f"({type(backbone.network).__name__}), which does not use it as a layer. Use "
                "another backbone, or adapt=None."
            )


def _factors(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    A, B = (getattr(layer, f"lora_{letter}")["default"].weight for letter in "AB")
    B = B * layer.scaling["default"]
    return A.detach().cpu().numpy().copy(), B.detach().cpu().numpy().copy()
