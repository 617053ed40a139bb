"""Normal images and anomalies -> the gate's network, its own weights tuned to tell them apart.

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import torch
from scipy.special import log_expit
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from anomalib_lite.backbones import Backbone, weights_sha256
from anomalib_lite.cascade.gate import LinearHead, sample_weights
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.fusion import patch_embeddings
from anomalib_lite.images import ImageSource, iter_batches
from anomalib_lite.metrics import auroc
from anomalib_lite.synthetic import SyntheticAnomalies

__all__ = ["FinetuningResult", "finetune_gate"]

# With steps ten times as large, a pretrained network forgets in the first epoch what it knows, and
# it depends on the images whether it recovers.
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-4
_BATCH = 16
# Of normal images, and of anomalies, for validation: one in so many.
_ONE_IN = 5
_REMEDY = "or training='head'."


@dataclass(frozen=True)
class FinetuningResult:
    """What was learned.

    Attributes
    ----------
    state : dict of str to tensor
        The network's weights, by its own names, on the CPU.
    sha256 : str
        Of these weights, as ``weights_sha256`` in ``_weights.py`` has it.
    head : LinearHead
        The line through the features that this network gives.
    history : list of dict
        ``validation_auroc`` and ``validation_loss``, first of the network as it was, then after
        each epoch, with its ``train_loss``.
    """

    state: dict[str, Tensor]
    sha256: str
    head: LinearHead
    history: list[dict[str, float]]


@dataclass
class _Examples:
    """Images as the network takes them, with their labels."""

    images: list[np.ndarray]  # each (H, W, 3), uint8; normal ones first
    kinds: list[int]  # how many anomalies there are of each kind

    @property
    def n_normal(self) -> int:
        return len(self.images) - sum(self.kinds)

    @property
    def y(self) -> np.ndarray:
        """(N,) int64: 0 for normal, 1 for anomalous."""
        return np.repeat([0, 1], [self.n_normal, sum(self.kinds)])

    def weights(self, class_weight: Any) -> np.ndarray:
        """(N,) float64, 1 on average."""
        weights = sample_weights(self.n_normal, self.kinds, class_weight)
        return np.asarray(weights / weights.mean())

    def batches(self, random: np.random.RandomState | None = None) -> Iterator[list[list[int]]]:
        """Positions in batches of about one length, each as groups of one size of image.

        In their order, or shuffled if told to. Batches of one size alone would be of a single
        image where that size is rare, and a step for that one a step too far.
        """
        n = len(self.images)
        order = np.arange(n) if random is None else random.permutation(n)
        for batch in np.array_split(order, math.ceil(n / _BATCH)):
            groups: dict[tuple[int, ...], list[int]] = {}
            for i in batch.tolist():
                groups.setdefault(self.images[i].shape, []).append(i)
            yield list(groups.values())


class GateNetwork(nn.Module):
    """A backbone and the line behind it: images -> logits.

    The line is one through features that are standardized by what they were before anything was
    learned, so that one learning rate suits them all.
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
        """As ``mean_max_pool`` has them, (B, 2 D), with gradients."""
        E = patch_embeddings(self._backbone(np.stack(images)), self._backbone.fusion)
        return torch.cat([E.mean(dim=(1, 2)), E.amax(dim=(1, 2))], dim=1)

    def forward(self, images: Sequence[np.ndarray]) -> Tensor:
        standardized = (self.features(images) - self.mean) / self.scale
        return standardized @ self.weights + self.bias

    def logits(self, examples: _Examples) -> np.ndarray:
        """(N,) float64."""
        with torch.no_grad():
            return self._all(self, examples)

    def head(self) -> LinearHead:
        """The line, through features as they are."""
        mean, scale, weights, bias = (
            tensor.detach().cpu().double().numpy()
            for tensor in (self.mean, self.scale, self.weights, self.bias)
        )
        return LinearHead(weights / scale, float(bias - mean @ (weights / scale)))

    def _all(self, ask: Any, examples: _Examples) -> np.ndarray:
        """What ``ask`` says of each image, in their order."""
        answers: dict[int, np.ndarray] = {}
        for group in chain.from_iterable(examples.batches()):
            found = ask([examples.images[i] for i in group]).double().cpu().numpy()
            answers |= dict(zip(group, found, strict=True))
        return np.stack([answers[i] for i in range(len(examples.images))])


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
    """Tune a network and the line behind it to tell normal images from anomalous ones.

    Parameters
    ----------
    backbone : Backbone
        Made with ``trainable=True``, in float32. It takes on what is learned: give one that
        nobody else uses.
    normal : ImageSource
        At least 2 images. A fifth is kept for validation.
    anomalous : ImageSource, optional
        The same; without them, or beside them, synthetic anomalies are made, of the normal
        images to learn from and of those for validation.
    image_size : int or (height, width)
        As :func:`~anomalib_lite.images.iter_batches` has it.
    n_synthetic : int, optional
        How many anomalies are made: 64, or none beside labelled ones, unless told otherwise. Both
        kinds weigh the same.
    class_weight : "balanced", dict or None, default="balanced"
        As in scikit-learn.
    epochs : int, default=20
    random : RandomState, optional
        Draws validation images, synthetic anomalies and the order of images.
    verbose : int, default=0
        Above 0, a progress bar in a terminal.

    Returns
    -------
    FinetuningResult
        Of the epoch with the largest AUROC on the validation images, of several such with the
        smallest loss. That may be the network as it was, if it got worse from there.

    Raises
    ------
    InvalidValueError
        If there are fewer than 2 images of a kind, the network has nothing that can learn, or
        learning diverges.
    AnomalibLiteError
        For an image that cannot be used.

    Notes
    -----
    The line is first fitted on the frozen network's features as :meth:`LinearHead.fit
    <anomalib_lite.cascade.gate.LinearHead.fit>` does, and then tuned with the network: so the first
    steps do not undo what the network knows [3]_. The loss of a batch of B images, 16 or a few
    less, is the cross-entropy

    .. math:: - \\frac{1}{B} \\sum_i w_{y_i} (y_i \\log p_i + (1 - y_i) \\log (1 - p_i))

    with the weights w of the classes, 1 on average over all images. AdamW [1]_ has a weight decay
    of 1e-4 and, in epoch e of n from 0 on, half a cosine [2]_ as learning rate,

    .. math:: \\tfrac{1}{2} \\cdot 10^{-4} (1 + \\cos (\\pi e / n)).

    Batch norms keep their means and variances: those of 16 images would say little, and what
    learns is then the very function that judges later. For the same reason nothing is dropped
    out. Images are not augmented: on many parts, a flip makes an anomaly.

    On a CPU, a seed gives the same bits again; on a GPU only nearly so.

    Examples
    --------
    >>> import numpy as np
    >>> good = np.random.default_rng(0).integers(90, 150, (10, 64, 64, 3), dtype=np.uint8)
    >>> backbone = Backbone("efficientnet_lite0", strides=(16, 32), device="cpu", trainable=True)
    >>> tuned = finetune_gate(
    ...     backbone, ImageSource(good), ImageSource(good // 2), image_size=64, epochs=1,
    ...     random=np.random.RandomState(0),
    ... )
    >>> len(tuned.history), sorted(tuned.history[1])
    (2, ['train_loss', 'validation_auroc', 'validation_loss'])
    """
    where = backbone.where
    random = np.random.RandomState() if random is None else random
    if n_synthetic is None:
        n_synthetic = 64 if anomalous is None else 0
    options: dict[str, Any] = {"image_size": image_size, "stride": backbone.stride}
    train, validation = _examples(normal, anomalous, n_synthetic, options, random)
    judge = GateNetwork(backbone, train, class_weight)
    if not judge.features(train.images[:1]).requires_grad:
        raise InvalidValueError(
            f"{where}: training='finetune' tunes the weights of a network, and the features of "
            f"this one ({type(backbone.network).__name__}) depend on none. Use another, {_REMEDY}"
        )
    history = [_validate(judge, validation, class_weight)]
    best, best_state, head = _rank(history[0]), _copy(backbone.network), judge.head()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    quiet = None if verbose else True
    for epoch in tqdm(range(epochs), "tune", unit="epoch", leave=False, disable=quiet):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * epoch / epochs)) / 2
        train_loss = _learn(judge, optimizer, train, class_weight, random)
        if not math.isfinite(train_loss):
            raise InvalidValueError(
                f"{where}: training='finetune' diverged in epoch {epoch + 1} of {epochs}: the "
                f"loss is {train_loss}. Use another network, {_REMEDY}"
            )
        history.append({"train_loss": train_loss, **_validate(judge, validation, class_weight)})
        if _rank(history[-1]) > best:
            best, best_state, head = _rank(history[-1]), _copy(backbone.network), judge.head()
    backbone.network.load_state_dict(best_state)
    return FinetuningResult(best_state, weights_sha256(backbone.network), head, history)


def _examples(
    normal: ImageSource,
    anomalous: ImageSource | None,
    n_synthetic: int,
    options: dict[str, Any],
    random: np.random.RandomState,
) -> Iterator[_Examples]:
    """Those to learn from, then those to validate by: no image, nor what is made of it, in both."""
    good = _split(normal, "normal images", random)
    bad = None if anomalous is None else _split(anomalous, "anomalies", random)
    n_validation = n_synthetic and max(1, n_synthetic // _ONE_IN)
    for k, n in enumerate((n_synthetic - n_validation, n_validation)):
        images, kinds = _load([good[k]], options), []
        sources = [_made(good[k], n, random.randint(2**31))] if n else []
        for source in (*sources, *([[bad[k]]] if bad else [])):
            found = _load(source, options)
            images += found
            kinds.append(len(found))
        yield _Examples(images, kinds)


def _split(
    source: ImageSource, what: str, random: np.random.RandomState
) -> tuple[ImageSource, ImageSource]:
    if len(source) < 2:
        raise InvalidValueError(
            f"{source.where}: training='finetune' needs at least 2 {what} to learn from, one of "
            f"them to validate, beside those held out; got {len(source)}. Give more, {_REMEDY}"
        )
    n_validation = max(1, len(source) // _ONE_IN)
    order = random.permutation(len(source))
    return source.take(order[n_validation:]), source.take(order[:n_validation])


def _made(normal: ImageSource, n: int, seed: int) -> Iterator[ImageSource]:
    """Synthetic anomalies, a few at a time: at their full size all may not fit into memory."""
    made = SyntheticAnomalies(random_state=seed).iterate(normal, n)
    while images := [anomaly.image for anomaly in islice(made, _BATCH)]:
        yield ImageSource(images, where=normal.where)


def _load(sources: Iterable[ImageSource], options: dict[str, Any]) -> list[np.ndarray]:
    """All images, as the network takes them."""
    images: list[np.ndarray] = []
    for source in sources:
        found: dict[int, np.ndarray] = {}
        for batch in iter_batches(source, batch_size=_BATCH, **options):
            pixels = batch.pixels
            if pixels.dtype != np.uint8:  # synthetic anomalies are, and shall not differ in this
                pixels = np.rint(255 * pixels).astype(np.uint8)
            found |= dict(zip(batch.indices, pixels, strict=True))
        images += [found[i] for i in range(len(source))]
    return images


def _learn(
    judge: GateNetwork,
    optimizer: torch.optim.Optimizer,
    train: _Examples,
    class_weight: Any,
    random: np.random.RandomState,
) -> float:
    """One epoch; the mean loss in it."""
    weights, total = train.weights(class_weight), 0.0
    for batch in train.batches(random):
        n = sum(map(len, batch))
        optimizer.zero_grad()
        for group in batch:  # gradients add up
            logits = judge([train.images[i] for i in group])
            y, w = (logits.new_tensor(array[group]) for array in (train.y, weights))
            loss = binary_cross_entropy_with_logits(logits, y, w, reduction="sum") / n
            loss.backward()  # type: ignore[no-untyped-call]
            total += n * loss.item()
        optimizer.step()
    return total / len(train.y)


def _validate(judge: GateNetwork, examples: _Examples, class_weight: Any) -> dict[str, float]:
    z, y = judge.logits(examples), examples.y
    losses = np.where(y == 1, -log_expit(z), -log_expit(-z))
    loss = float(np.average(losses, weights=examples.weights(class_weight)))
    # Learning may end in numbers that are none; they are the worst.
    area = auroc(y, z) if np.isfinite(z).all() else 0.0
    return {"validation_loss": loss, "validation_auroc": area}


def _rank(entry: dict[str, float]) -> tuple[float, float]:
    """What is larger the better: an easy task has many epochs that separate all."""
    return entry["validation_auroc"], -entry["validation_loss"]


def _copy(network: nn.Module) -> dict[str, Tensor]:
    """The weights as they are, each in memory of its own."""
    contiguous = torch.contiguous_format
    return {
        name: tensor.detach().cpu().clone(memory_format=contiguous)
        for name, tensor in network.state_dict().items()
    }
