"""Normal images -> low-rank updates of a vision transformer that make defects stand out.

Low-rank adaptation [1]_ of the attention: the network learns to tell patches of normal images
from those of synthetic anomalies, while its own weights stay frozen.

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

from anomalib_lite._validation import check_int, check_number
from anomalib_lite.backbones import Backbone
from anomalib_lite.errors import InvalidValueError, MissingDependencyError
from anomalib_lite.gaussian import Moments
from anomalib_lite.images import ImageSource, load_all
from anomalib_lite.lora._epochs import early_best
from anomalib_lite.lora._task import Example, Task, batches_of, split_patches_and_image
from anomalib_lite.networks.adapter import Adapter
from anomalib_lite.synthetic import SyntheticAnomalies

__all__ = ["Adapter", "adaptive_rank", "train_adapter"]

# Largest number of images, drawn at random from more: they are held in memory.
MOST_IMAGES = 512
# Share of the learned update that is kept: real defects are not quite the synthetic ones, and
# weights between those of both networks are good at both.
SHARE = 0.3
# Number of synthetic anomalies for validation, for each validation image.
_ANOMALIES_TO_VALIDATE = 3
# Epochs without a better one after which training ends.
_PATIENCE = 3
_WEIGHT_DECAY = 0.01
# Images that an adapter needs.
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
    """Train low-rank updates of a vision transformer's attention, against synthetic anomalies.

    Parameters
    ----------
    backbone : Backbone
        Made in float32, with ``fusion="summary"``. Its network is changed: give one that nothing
        else uses.
    source : ImageSource
        Normal images, at least 4. A fifth is kept for validation.
    image_size : int or (height, width)
        Image size of the detector.
    rank : int or "adaptive", default=16
        Rank of the update; ``"adaptive"`` asks :func:`adaptive_rank`.
    alpha : float, optional
        The update is multiplied by ``alpha / rank``; 2 ``rank`` by default.
    epochs : int, default=10
        Maximum number of epochs; training ends after 3 without a better validation.
    learning_rate : float, default=1e-3
        Learning rate of AdamW.
    shrinkage, normalize
        Shrinkage of the Gaussians, and whether features are divided by their length, as in the
        detector.
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        Number type of the network; anything but float32 means mixed precision in bfloat16.
    on_error : {"raise", "skip"}, default="raise"
        Whether an image that cannot be read raises its error or is left out.
    random : RandomState, optional
        Draws images, anomalies and first weights.
    verbose : int, default=0
        Above 0, a progress bar in a terminal.

    Returns
    -------
    Adapter
        Update of the epoch with the best validation; empty, if no epoch was better than the
        network without an update.

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
    several scales). They are whitened by the Gaussian of normal features of the network without
    an update, :math:`w = L^T (f - \\mu)` with :math:`L L^T = \\Sigma^{-1}`, so that
    :math:`m = |w|^2 / d` is the squared Mahalanobis distance divided by the dimension. A head,
    D -> 512 -> 256 -> 1, gives each patch a logit z from w; another head of this shape does so for
    each image. Both z and m become a confidence,

    .. math:: \\sigma(z / T), \\quad \\sigma(a (m - b)),

    with the temperature T = 2 and learned a and b. The loss of each confidence is its cross-entropy
    with the labels, where masks of the anomalies label the patches, and both classes weigh the
    same:

    .. math:: - \\tfrac{1}{2} E_{y = 0} \\log(1 - \\sigma) - \\tfrac{1}{2} E_{y = 1} \\log \\sigma

    The whole loss is half the sum of these four, plus 0.1 times the mean of
    :math:`|w - w_0|^2 / d` over normal patches and normal images, where w_0 is without the update.
    Each epoch has new anomalies, as many as normal images. The heads are thrown away.

    For validation, the Gaussians are fitted anew on the features of the training images, and
    distances of synthetic anomalies are compared with those of normal images: by the mean of the
    AUROC of patches and that of images.

    A share of 0.3 of the learned update is kept: weights between those of a network and those that
    were finetuned lose less on what the finetuning has not seen [2]_.
    """
    where = backbone.where
    _check_training(backbone, epochs, learning_rate)
    random = np.random.RandomState() if random is None else random
    names = _attention_layers(backbone)
    held_back, images = _load(backbone, source, image_size, on_error, random)
    rank = adaptive_rank(backbone, images) if rank == "adaptive" else rank
    rank = check_int("rank", rank, where, low=1)
    alpha = check_number("alpha", 2 * rank if alpha is None else alpha, where, "(0, inf)")
    normal = [Example.normal(image) for image in images]
    validation = [Example.normal(image) for image in held_back]
    validation += _anomalies(held_back, _ANOMALIES_TO_VALIDATE * len(held_back), random)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(random.randint(2**31))
        _put_lora_into(backbone.network, names, rank, alpha)
        task = Task(backbone, names, normal, shrinkage=shrinkage, normalize=normalize, dtype=dtype)
    learned = [p for p in [*backbone.network.parameters(), *task.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=_WEIGHT_DECAY)

    def train(epoch: int) -> float:
        batches = batches_of([*normal, *_anomalies(images, len(images), random)], random)
        return float(np.mean([_step(task, optimizer, batch, backbone, names) for batch in batches]))

    factors, history = early_best(
        epochs,
        train,
        lambda: {"validation_auroc": task.validate(normal, validation)},
        lambda: {n: _factors(backbone.network.get_submodule(n)) for n in names},
        rank=lambda figures: figures["validation_auroc"],
        patience=_PATIENCE,
        description="adapt",
        verbose=verbose,
    )
    # B is 0 if no epoch was better, and in layers behind the last one that is asked for.
    kept = {name: (A, np.float32(SHARE) * B) for name, (A, B) in factors.items() if B.any()}
    return Adapter(kept, rank, alpha, history)


def _check_training(backbone: Backbone, epochs: int, learning_rate: float) -> None:
    where = backbone.where
    check_peft(where)
    check_int("epochs", epochs, where, low=1)
    check_number("learning_rate", learning_rate, where, "(0, 1)")
    if backbone.fusion != "summary" or backbone.dtype != torch.float32:
        raise InvalidValueError(
            f"{where}: an adapter is trained on a Backbone with fusion='summary' and "
            f"dtype='float32', got {backbone.fusion!r} and {backbone.dtype}."
        )


def _load(
    backbone: Backbone,
    source: ImageSource,
    image_size: int | tuple[int, int],
    on_error: str,
    random: np.random.RandomState,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Load images for validation and for training, at the size for the backbone."""
    chosen = source.take(random.permutation(len(source))[:MOST_IMAGES])
    images = load_all(chosen, image_size, backbone.stride, on_error=on_error)
    if len(images) < _FEWEST:
        raise InvalidValueError(
            f"{backbone.where}: {len(images)} images are too few to adapt to; give at least "
            f"{_FEWEST}, beside those held back for calibration, or adapt=None."
        )
    n_validation = max(1, len(images) // 5)
    return images[:n_validation], images[n_validation:]


def _step(
    task: Task,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    backbone: Backbone,
    adapted: list[str],
) -> float:
    """Take one step, and return the loss before it."""
    loss = task.loss(batch)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    _check_gradients(backbone, adapted)
    optimizer.step()
    return loss.item()


def check_peft(where: str) -> None:
    """Raise MissingDependencyError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError(
            f"{where}: adapt='lora' needs peft, which is not installed. Install it with: "
            "pip install 'anomalib-lite[lora]', or use adapt=None."
        )


def adaptive_rank(backbone: Backbone, images: Sequence[np.ndarray]) -> int:
    """Choose a rank, a power of two from 4 to 64, by how many directions normal patches take up.

    Parameters
    ----------
    backbone : Backbone
        Made with ``fusion="summary"``.
    images : sequence of arrays (H, W, 3), uint8
        Normal images at the size for the backbone.

    Returns
    -------
    int
        The power of two nearest to the participation ratio
        :math:`(\\sum_i \\lambda_i)^2 / \\sum_i \\lambda_i^2` of the eigenvalues of the
        covariance of all patches.
    """
    moments: Moments | None = None
    with torch.no_grad():
        for image in images:
            X = split_patches_and_image(backbone, image[None])[0].flatten(0, 2).cpu().numpy()
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


def _attention_layers(backbone: Backbone) -> list[str]:
    """Return the names of the linear layers of the attention."""
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
    """Raise if a layer has no gradient: some networks read a layer's weights without calling it."""
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
