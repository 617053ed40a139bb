"""Normal images and anomalies -> the gate's network, finetuned to tell them apart.

References
----------
.. [1] Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019,
   arXiv:1711.05101.
.. [2] Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts", ICLR 2017,
   arXiv:1608.03983.
.. [3] Kumar, Raghunathan, Jones, Ma and Liang, "Fine-tuning can distort pretrained features and
   underperform out-of-distribution", ICLR 2022, arXiv:2202.10054.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from scipy.special import log_expit
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from anomalib_lite.backbones import Backbone, weights_sha256
from anomalib_lite.cascade.gate import LinearHead, sample_weights
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.fusion import patch_embeddings
from anomalib_lite.images import ImageSource, by_size, load_all
from anomalib_lite.lora import early_best
from anomalib_lite.metrics import auroc
from anomalib_lite.synthetic import SyntheticAnomalies

__all__ = ["FinetuningResult", "finetune_gate"]

# At ten times this rate, a pretrained network loses its features in the first epoch and may not
# recover them.
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-4
_BATCH = 16
# One image in so many is for validation, of each class.
_ONE_IN = 5
_REMEDY = "or training='head'."


@dataclass(frozen=True)
class FinetuningResult:
    """A finetuned network and its head.

    Attributes
    ----------
    state : dict of str to tensor
        Weights of the network, by its own names, on the CPU.
    sha256 : str
        Hash of these weights, as :func:`~anomalib_lite.backbones.weights_sha256` gives it.
    head : LinearHead
        Classifier of the features that this network gives.
    history : list of dict
        ``validation_auroc`` and ``validation_loss``, first of the frozen network, then after each
        epoch, with its ``train_loss``.
    """

    state: dict[str, Tensor]
    sha256: str
    head: LinearHead
    history: list[dict[str, float]]


@dataclass
class _Examples:
    """Images at the network's size, with their labels."""

    images: list[np.ndarray]  # each (H, W, 3), uint8; normal ones first
    kinds: list[int]  # number of anomalies of each kind

    @property
    def n_normal(self) -> int:
        """Number of normal images; they come first."""
        return len(self.images) - sum(self.kinds)

    @property
    def y(self) -> np.ndarray:
        """Labels (N,), int64: 0 for normal, 1 for anomalous."""
        return np.repeat([0, 1], [self.n_normal, sum(self.kinds)])

    def weights(self, class_weight: Any) -> np.ndarray:
        """Return sample weights (N,), float64, of mean 1."""
        weights = sample_weights(self.n_normal, self.kinds, class_weight)
        return np.asarray(weights / weights.mean())

    def batches(self, random: np.random.RandomState | None = None) -> Iterator[list[list[int]]]:
        """Yield positions in batches of nearly equal length, each as groups of one image size.

        They are shuffled if ``random`` is given. A batch may hold several sizes. If each batch had
        one size, a rare size would get a whole optimizer step for a single image.
        """
        n = len(self.images)
        order = np.arange(n) if random is None else random.permutation(n)
        for batch in np.array_split(order, math.ceil(n / _BATCH)):
            yield list(by_size(batch.tolist(), lambda i: self.images[i].shape, len(batch)))


class GateNetwork(nn.Module):
    """A backbone and a linear head: images -> logits.

    The head gets standardized features, so that one learning rate suits all of them. Means and
    scales are those of the frozen network's features.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone, train: _Examples, class_weight: Any) -> None:
        super().__init__()
        self._backbone, self.network = backbone, backbone.network
        with torch.no_grad():
            X = self._all(self.features, train)
        ends = train.n_normal + np.cumsum([0, *train.kinds])
        anomalous = [X[start:end] for start, end in pairwise(ends)]
        head = LinearHead.fit(X[: train.n_normal], anomalous, class_weight, backbone.where)
        scaler = StandardScaler().fit(X)
        for name, array in (("mean", scaler.mean_), ("scale", scaler.scale_)):
            self.register_buffer(name, torch.tensor(array, dtype=torch.float32))
        weights, bias = head.weights * scaler.scale_, head.bias + scaler.mean_ @ head.weights
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float32))
        self.bias = nn.Parameter(torch.tensor(bias, dtype=torch.float32))
        self.to(backbone.device)

    def features(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return features (B, 2 D) as ``mean_max_pool`` does, with gradients."""
        E = patch_embeddings(self._backbone(np.stack(images)), self._backbone.fusion)
        return torch.cat([E.mean(dim=(1, 2)), E.amax(dim=(1, 2))], dim=1)

    def forward(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return the logits of images, (B,)."""
        standardized = (self.features(images) - self.mean) / self.scale
        return standardized @ self.weights + self.bias

    def logits(self, examples: _Examples) -> np.ndarray:
        """Return logits (N,), float64."""
        with torch.no_grad():
            return self._all(self, examples)

    def head(self) -> LinearHead:
        """Return the head for features that are not standardized."""
        mean, scale, weights, bias = (
            tensor.detach().cpu().double().numpy()
            for tensor in (self.mean, self.scale, self.weights, self.bias)
        )
        return LinearHead(weights / scale, float(bias - mean @ (weights / scale)))

    def _all(self, function: Callable[[Any], Tensor], examples: _Examples) -> np.ndarray:
        """Apply a function of images to all examples, in their order."""
        found: dict[int, np.ndarray] = {}
        for group in chain.from_iterable(examples.batches()):
            values = function([examples.images[i] for i in group]).double().cpu().numpy()
            found |= dict(zip(group, values, strict=True))
        return np.stack([found[i] for i in range(len(examples.images))])


def finetune_gate(
    backbone: Backbone,
    normal: ImageSource,
    anomalous: ImageSource | None,
    *,
    image_size: int | tuple[int, int],
    n_synthetic: int | None = None,
    class_weight: Any = "balanced",
    epochs: int = 20,
    random: np.random.RandomState | None = None,
    verbose: int = 0,
) -> FinetuningResult:
    """Finetune a network and its head to tell normal images from anomalous ones.

    Parameters
    ----------
    backbone : Backbone
        Made with ``trainable=True``, in float32. Its weights are changed, so nothing else should
        use it.
    normal : ImageSource
        At least 2 normal images. A fifth is kept for validation.
    anomalous : ImageSource, optional
        At least 2 anomalous images. A fifth is kept for validation.
    image_size : int or (height, width)
        As in :func:`~anomalib_lite.images.iter_batches`.
    n_synthetic : int, optional
        Number of synthetic anomalies, for training and validation together; those for validation
        are made from the normal images for validation. By default 64 if there are no labelled
        anomalies, otherwise none. Labelled and synthetic anomalies have the same total weight.
    class_weight : "balanced", dict or None, default="balanced"
        Weights of the classes 0 and 1, as in scikit-learn.
    epochs : int, default=20
        Number of epochs.
    random : RandomState, optional
        Draws validation images, synthetic anomalies and the order of images.
    verbose : int, default=0
        Above 0, a progress bar in a terminal.

    Returns
    -------
    FinetuningResult
        Result of the epoch with the largest AUROC on the validation images; of epochs with equal
        AUROC, the one with the smallest loss. If no epoch is better than the frozen network, its
        result.

    Raises
    ------
    InvalidValueError
        If there are fewer than 2 images of a class, the network has no weights that can learn, or
        the loss diverges.
    AnomalibLiteError
        For an image that cannot be used.

    Notes
    -----
    The head is first fitted to the frozen network's features as :meth:`LinearHead.fit
    <anomalib_lite.cascade.gate.LinearHead.fit>` does, and then finetuned with the network. So the
    first steps do not distort the pretrained features [3]_. The loss of a batch of B images (at
    most 16) is the cross-entropy

    .. math:: - \\frac{1}{B} \\sum_i w_{y_i} (y_i \\log p_i + (1 - y_i) \\log (1 - p_i))

    with the weights w of the classes, 1 on average over all images. AdamW [1]_ has a weight decay
    of 1e-4. The learning rate of epoch e (0 to n - 1) follows half a cosine [2]_,

    .. math:: \\tfrac{1}{2} \\cdot 10^{-4} (1 + \\cos (\\pi e / n)).

    Batch norms keep their means and variances: statistics of 16 images would be noisy, and the
    network computes the same function in training as in scoring. For the second reason there is no
    dropout. Images are not augmented: on many parts, a flip makes an anomaly.

    On a CPU, a seed gives the same bits again; on a GPU nearly the same.

    Examples
    --------
    >>> import numpy as np
    >>> good = np.random.default_rng(0).integers(90, 150, (10, 64, 64, 3), dtype=np.uint8)
    >>> backbone = Backbone("efficientnet_lite0", strides=(16, 32), device="cpu", trainable=True)
    >>> result = finetune_gate(
    ...     backbone, ImageSource(good), ImageSource(good // 2), image_size=64, epochs=1,
    ...     random=np.random.RandomState(0),
    ... )
    >>> len(result.history), sorted(result.history[1])
    (2, ['train_loss', 'validation_auroc', 'validation_loss'])
    """
    where = backbone.where
    random = np.random.RandomState() if random is None else random
    if n_synthetic is None:
        n_synthetic = 64 if anomalous is None else 0
    size = (image_size, backbone.stride)
    train, validation = _examples(normal, anomalous, n_synthetic, size, random)
    network = GateNetwork(backbone, train, class_weight)
    if not network.features(train.images[:1]).requires_grad:
        raise InvalidValueError(
            f"{where}: training='finetune' tunes the weights of a network, and the features of "
            f"this one ({type(backbone.network).__name__}) depend on none. Use another, {_REMEDY}"
        )
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def learn(epoch: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
        loss = _learn(network, optimizer, train, class_weight, random)
        if not math.isfinite(loss):
            raise InvalidValueError(
                f"{where}: training='finetune' diverged in epoch {epoch} of {epochs}: the loss is "
                f"{loss}. Use another network, {_REMEDY}"
            )
        return loss

    (state, head), history = early_best(
        epochs,
        learn,
        lambda: _validate(network, validation, class_weight),
        lambda: (_copy(backbone.network), network.head()),
        rank=_rank,
        description="tune",
        verbose=verbose,
    )
    backbone.network.load_state_dict(state)
    return FinetuningResult(state, weights_sha256(backbone.network), head, history)


def _examples(
    normal: ImageSource,
    anomalous: ImageSource | None,
    n_synthetic: int,
    size: tuple[int | tuple[int, int], int],
    random: np.random.RandomState,
) -> Iterator[_Examples]:
    """Yield the examples for training, then those for validation.

    They share no image, and no anomaly made from the same image. ``size`` is the image size and the
    stride.
    """
    good = _split(normal, "normal images", random)
    bad = None if anomalous is None else _split(anomalous, "anomalies", random)
    n_validation = n_synthetic and max(1, n_synthetic // _ONE_IN)
    for k, n in enumerate((n_synthetic - n_validation, n_validation)):
        images, kinds = load_all(good[k], *size), []
        if n:
            made = SyntheticAnomalies(random_state=random.randint(2**31))
            # A few at a time: at full size, all of them may not fit into memory.
            sources = made.sources(good[k], n, _BATCH)
            kinds.append([image for some in sources for image in load_all(some, *size)])
        if bad is not None:
            kinds.append(load_all(bad[k], *size))
        yield _Examples([*images, *chain.from_iterable(kinds)], [len(kind) for kind in kinds])


def _split(
    source: ImageSource, what: str, random: np.random.RandomState
) -> tuple[ImageSource, ImageSource]:
    """Draw images for training and for validation."""
    if len(source) < 2:
        raise InvalidValueError(
            f"{source.where}: training='finetune' needs at least 2 {what} to learn from, one of "
            f"them to validate, beside those held back; got {len(source)}. Give more, {_REMEDY}"
        )
    n_validation = max(1, len(source) // _ONE_IN)
    order = random.permutation(len(source))
    return source.take(order[n_validation:]), source.take(order[:n_validation])


def _learn(
    network: GateNetwork,
    optimizer: torch.optim.Optimizer,
    train: _Examples,
    class_weight: Any,
    random: np.random.RandomState,
) -> float:
    """Train one epoch, and return its mean loss."""
    weights, total = train.weights(class_weight), 0.0
    for batch in train.batches(random):
        n = sum(map(len, batch))
        optimizer.zero_grad()
        for group in batch:  # gradients add up
            logits = network([train.images[i] for i in group])
            y, w = (logits.new_tensor(array[group]) for array in (train.y, weights))
            loss = binary_cross_entropy_with_logits(logits, y, w, reduction="sum") / n
            loss.backward()  # type: ignore[no-untyped-call]
            total += n * loss.item()
        optimizer.step()
    return total / len(train.y)


def _validate(network: GateNetwork, examples: _Examples, class_weight: Any) -> dict[str, float]:
    z, y = network.logits(examples), examples.y
    losses = np.where(y == 1, -log_expit(z), -log_expit(-z))
    loss = float(np.average(losses, weights=examples.weights(class_weight)))
    # Training may end in NaN or infinity, which is worst.
    area = auroc(y, z) if np.isfinite(z).all() else 0.0
    return {"validation_loss": loss, "validation_auroc": area}


def _rank(entry: dict[str, float]) -> tuple[float, float]:
    """Rank epochs by AUROC, then by loss: in an easy task, many epochs have an AUROC of 1."""
    return entry["validation_auroc"], -entry["validation_loss"]


def _copy(network: nn.Module) -> dict[str, Tensor]:
    """Copy the weights, each into memory of its own."""
    contiguous = torch.contiguous_format
    return {
        name: tensor.detach().cpu().clone(memory_format=contiguous)
        for name, tensor in network.state_dict().items()
    }
