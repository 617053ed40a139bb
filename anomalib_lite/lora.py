"""Normal images -> small changes of a vision transformer that make defects stand out.

Low-rank adaptation [1]_ of the attention: the network learns to tell patches of normal images
from those of synthetic anomalies, while its own weights stay as they are.

References
----------
.. [1] Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen, "LoRA: Low-rank adaptation of large
   language models", ICLR 2022, arXiv:2106.09685.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, binary_cross_entropy_with_logits, normalize
from tqdm import tqdm

from anomalib_lite._adapter import Adapter
from anomalib_lite._device import resolve_dtype
from anomalib_lite._moments import Moments
from anomalib_lite.backbones import Backbone
from anomalib_lite.errors import InvalidValueError, MissingDependencyError
from anomalib_lite.fusion import patch_embeddings
from anomalib_lite.images import ImageSource, iter_batches
from anomalib_lite.synthetic import SyntheticAnomalies

__all__ = ["Adapter", "adaptive_rank", "train_adapter"]

# Logits are divided by it before they become a confidence, so that the loss goes on asking for a
# margin where the head is sure already.
TEMPERATURE = 2.0
# Weight of the term that keeps features of normal images where they are: without it, the network
# forgets what it would have seen of defects unlike the synthetic ones.
KEEP = 1.0
# A patch is anomalous from this share of its pixels on; with less, but some, it does not count.
ANOMALOUS_SHARE = 0.1
# Images to learn from, drawn at random where there are more: they are held in memory.
MOST_IMAGES = 512
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
    learning_rate: float = 3e-4,
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
        At most; ended after 3 without a smaller loss on the validation images.
    learning_rate : float, default=3e-4
        Of AdamW.
    on_error : {"raise", "skip"}, default="raise"
        Whether an image that cannot be read ends everything or is left out.
    random : RandomState, optional
        Draws images, anomalies and first weights.
    verbose : int, default=0
        Above 0, a progress bar in a terminal.

    Returns
    -------
    Adapter
        Of the epoch with the smallest validation loss.

    Raises
    ------
    MissingDependencyError
        If peft is not installed.
    InvalidValueError
        If the backbone has no attention, or there are fewer than 4 images.

    Notes
    -----
    The features are those that the Gaussians will see, of length 1. A head, D -> 512 -> 256 -> 1,
    gives each patch a logit z, another of the same shape each image. Their confidence
    is :math:`\\sigma(z / T)` with the temperature T = 2, and the loss of patches, whose
    labels y come from the anomalies' masks, is its cross-entropy, normal and anomalous patches
    weighing the same:

    .. math:: L_p = - \\tfrac{1}{2} E_{y = 0} \\log(1 - \\sigma(z / T))
                    - \\tfrac{1}{2} E_{y = 1} \\log \\sigma(z / T)

    That of images, :math:`L_i`, is alike. The whole is

    .. math:: \\tfrac{1}{2} (L_p + L_i) + E_{normal} |f - f_0|^2 / v

    where f and f_0 are features of patches with and without the adapter, and v is the variance
    of f_0. Each epoch has new anomalies, as many as normal images. Heads are thrown away.
    """
    where = backbone.where
    random = np.random.RandomState() if random is None else random
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError(
            f"{where}: adapt='lora' needs peft, which is not installed. Install it with: "
            "pip install 'anomalib-lite[lora]', or use adapt=None."
        )
    from peft import LoraConfig, inject_adapter_in_model

    names = _attention_layers(backbone)
    images = _load(source, image_size, backbone.stride, on_error, random)
    if len(images) < _FEWEST:
        raise InvalidValueError(
            f"{where}: {len(images)} images are too few to adapt to; give at least {_FEWEST}, "
            "beside those held back for calibration, or adapt=None."
        )
    n_validation = max(1, len(images) // 5)
    validation, train = images[:n_validation], images[n_validation:]
    if rank == "adaptive":
        rank = adaptive_rank(backbone, train)
    assert isinstance(rank, int)
    alpha = 2.0 * rank if alpha is None else float(alpha)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.randint(2**31))
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)  # type: ignore[arg-type]
        inject_adapter_in_model(config, backbone.network)
        task = _Task(backbone, names, train[:_BATCH])
    learned = [p for p in [*backbone.network.parameters(), *task.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    to_validate = _examples(validation, SyntheticAnomalies(random_state=random))
    history: list[dict[str, float]] = []
    best: dict[str, Any] = {}
    quiet = None if verbose else True
    for _ in tqdm(range(epochs), desc="adapt", unit="epoch", leave=False, disable=quiet):
        losses = []
        for batch in _batches(_examples(train, SyntheticAnomalies(random_state=random)), random):
            loss = task.loss(batch)[0]
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        history.append({"train_loss": float(np.mean(losses)), **task.validate(to_validate)})
        order = np.argsort([h["validation_loss"] for h in history], kind="stable")
        if order[0] == len(history) - 1:
            best = {n: _factors(backbone.network.get_submodule(n)) for n in names}
        elif len(history) - 1 - order[0] >= _PATIENCE:
            break
    # Layers behind the last one that is asked for have learned nothing.
    factors = {name: (A, B) for name, (A, B) in best.items() if B.any()}
    return Adapter(factors, rank, alpha, history)


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
            X = _features(backbone, image[None])[0].flatten(0, 2).cpu().numpy()
            moments = moments or Moments(X.shape[1])
            moments.add(X)
    assert moments is not None
    ratio = np.trace(moments.scatter) ** 2 / np.square(moments.scatter).sum()
    return int(2 ** np.clip(np.rint(np.log2(ratio)), 2, 6))


@dataclass
class _Example:
    """A normal image, or one with a synthetic anomaly and its mask."""

    pixels: np.ndarray
    mask: np.ndarray


class _Task(nn.Module):
    """What is to be learned: two heads on the features of a backbone, and their loss."""

    def __init__(
        self, backbone: Backbone, adapted: list[str], images: Sequence[np.ndarray]
    ) -> None:
        super().__init__()
        self._backbone = backbone
        self._adapted: list[Any] = [backbone.network.get_submodule(name) for name in adapted]
        self._dtype = resolve_dtype("auto", backbone.device, backbone.where)
        frozen = [self.frozen_features(image[None]).flatten(0, 2) for image in images]
        n_features = frozen[0].shape[1]
        self._scale = n_features**0.5
        self._variance = float(torch.cat(frozen).var(dim=0).sum())
        self.patch_head, self.image_head = _head(n_features), _head(n_features)
        self.to(backbone.device)

    def loss(self, batch: Sequence[_Example]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a batch; logits and targets of those patches that count."""
        pixels = np.stack([e.pixels for e in batch])
        masks = torch.from_numpy(np.stack([e.mask for e in batch])).to(self._backbone.device)
        with self._autocast():
            X, G = _features(self._backbone, pixels)
            patches = self.patch_head(X * self._scale)[..., 0].float() / TEMPERATURE
            images = self.image_head(G * self._scale)[:, 0].float() / TEMPERATURE
        targets, counts = targets_of(masks, (X.shape[1], X.shape[2]))
        logits, targets = patches[counts], targets[counts]
        losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
        kinds = [losses[targets == y] for y in (0, 1)]
        loss = sum(0.25 * kind.mean() for kind in kinds if len(kind))
        is_normal = ~masks.flatten(1).any(dim=1)
        loss = loss + 0.5 * binary_cross_entropy_with_logits(images, (~is_normal).float())
        if is_normal.any():
            frozen = self.frozen_features(pixels[is_normal.cpu().numpy()])
            moved = (X[is_normal].float() - frozen).square().sum(dim=-1).mean()
            loss = loss + KEEP * moved / self._variance
        return loss, logits, targets

    @torch.no_grad()
    def validate(self, examples: Sequence[_Example]) -> dict[str, float]:
        """Loss, and AUROC of the patches."""
        losses, logits, targets = [], [], []
        for batch in _batches(examples, None):
            loss, z, y = self.loss(batch)
            losses.append(float(loss) * len(batch))
            logits.append(z.cpu())
            targets.append(y.cpu())
        labels, values = torch.cat(targets).numpy(), torch.cat(logits).numpy()
        both = 0 < labels.sum() < len(labels)
        area = float(roc_auc_score(labels, values)) if both else float("nan")
        return {"validation_loss": sum(losses) / len(examples), "validation_auroc": area}

    @torch.no_grad()
    def frozen_features(self, pixels: np.ndarray) -> Tensor:
        """Of patches, by the network as it was: (B, h, w, d)."""
        for layer in self._adapted:
            layer.enable_adapters(False)
        try:
            with self._autocast():
                return _features(self._backbone, pixels)[0].float()
        finally:
            for layer in self._adapted:
                layer.enable_adapters(True)

    def _autocast(self) -> torch.autocast:
        on = self._dtype != torch.float32
        return torch.autocast(self._backbone.device.type, torch.bfloat16, enabled=on)


def targets_of(masks: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Masks (B, H, W) -> targets 0.0 or 1.0 of patches (B, h, w), and which of them count."""
    share = adaptive_avg_pool2d(masks[:, None].float(), size)[:, 0]
    targets = (share >= ANOMALOUS_SHARE).float()
    return targets, (share == 0) | (targets > 0)


def _head(n_features: int) -> nn.Sequential:
    sizes = ((n_features, 512), (512, 256), (256, 1))
    layers = [layer for n, m in sizes for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _features(backbone: Backbone, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Patches (B, h, w, d) and images (B, d), of length 1, with gradients."""
    E = patch_embeddings(backbone(pixels), backbone.fusion)
    n_features = E.shape[-1] // 2
    return normalize(E[..., :n_features], dim=-1), normalize(E[:, 0, 0, n_features:], dim=-1)


def _examples(normal: Sequence[np.ndarray], anomalies: SyntheticAnomalies) -> list[_Example]:
    """Each normal image, and as many anomalies made of them."""
    made = anomalies.iterate(normal, len(normal))
    return [_Example(x, np.zeros(x.shape[:2], bool)) for x in normal] + [
        _Example(a.image, a.mask) for a in made
    ]


def _batches(
    examples: Sequence[_Example], random: np.random.RandomState | None
) -> Iterator[list[_Example]]:
    """Batches of one size each, shuffled if told to."""
    order = range(len(examples)) if random is None else random.permutation(len(examples))
    waiting: dict[tuple[int, ...], list[_Example]] = {}
    for i in order:
        group = waiting.setdefault(examples[i].pixels.shape, [])
        group.append(examples[i])
        if len(group) == _BATCH:
            yield waiting.pop(examples[i].pixels.shape)
    yield from waiting.values()


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
        if isinstance(module, nn.Linear) and "att" in f".{name}".split(".")[-2]
    ]
    if not names:
        raise InvalidValueError(
            f"{backbone.where}: adapt='lora' adapts the attention of a vision transformer, and "
            f"this backbone ({type(backbone.network).__name__}) has none. Use another, such as "
            "'vit_small_patch14_dinov2.lvd142m', or adapt=None."
        )
    return names


def _factors(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    A, B = (getattr(layer, f"lora_{letter}")["default"].weight for letter in "AB")
    B = B * layer.scaling["default"]
    return A.detach().cpu().numpy().copy(), B.detach().cpu().numpy().copy()
