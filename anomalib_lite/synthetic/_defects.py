"""A place on an image -> the change of a defect there, in gray levels, for each kind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import (
    affine_transform,
    gaussian_filter,
    gaussian_filter1d,
    shift,
    uniform_filter,
)

__all__ = ["MAKERS", "Place"]

# Smallest and largest area of a defect, as shares of the image.
_AREAS = (0.0002, 0.05)
# Smallest area in pixels: in small images a smaller one could not be seen.
_LEAST_AREA = 6.0
# Kinds that are drawn as lines.
_LINES = ("scratch", "crack")


class Place:
    """The place of a defect: a window of the image, and what its surroundings are like.

    Attributes
    ----------
    crop : ndarray of shape (h, w, 3), float64
        Pixels of the window ``window`` around the defect.
    center : (row, column)
        Centre of the defect in the window; ``at`` is its centre in the image.
    area, length, unit : float
        Area of a spot, length of a line and width of a fine one, in pixels.
    contrast, sign, light
        Contrast in gray levels; +1 for brighter and -1 for darker; direction of the light.
    """

    def __init__(
        self,
        random: np.random.RandomState,
        image: np.ndarray,
        kind: str,
        severity: float,
        donor: Callable[[], np.ndarray],
    ) -> None:
        self.random, self.donor, self.severity = random, donor, severity
        n_pixels = image.shape[0] * image.shape[1]
        low, high = (max(share * n_pixels, _LEAST_AREA) for share in _AREAS)
        self.area = float(np.exp(random.uniform(np.log(low), np.log(high))))
        self.unit = max(1.0, 0.004 * np.sqrt(n_pixels))
        self.length = 4 * np.sqrt(self.area)
        reach = 4 + (0.65 * self.length if kind in _LINES else 2.2 * np.sqrt(self.area))
        self.at = _on_object(random, image)
        corner = [max(0, int(a - reach)) for a in self.at]
        self.window = tuple(
            slice(low, int(a + reach) + 1) for low, a in zip(corner, self.at, strict=True)
        )
        self.center = np.subtract(self.at, corner)
        self.crop = image[self.window].astype(np.float64)
        self.shape = self.crop.shape[:2]
        gray = self.crop.mean(axis=2)
        self.level = float(gray.mean())
        # Roughness of the material, as a median: edges of objects hardly change it.
        self.grain = 1.48 * float(np.median(np.abs(gray - gaussian_filter(gray, 1.5))))
        self.contrast = severity * (25 + 1.5 * min(float(gray.std()), 40.0))
        brighter = np.clip(1.3 - 1.6 * self.level / 255, 0, 1)
        self.sign = 1.0 if random.uniform() < brighter else -1.0
        angle = random.uniform(0, 2 * np.pi)
        self.light = np.array([np.sin(angle), np.cos(angle)])


def _on_object(random: np.random.RandomState, image: np.ndarray) -> tuple[float, float]:
    """Draw a place (row, column) that does not lie on background.

    Background has the median colour of the border (within 12 levels) and is locally flat (a
    standard deviation below 5). If it is nearly the whole image, any place is drawn.
    """
    step = -(-max(image.shape[:2]) // 256)
    small = image[::step, ::step].astype(np.float32)
    border = np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]])
    near = np.abs(small - np.median(border, axis=0)).max(axis=2) < 12
    gray = small.mean(axis=2)
    variance = uniform_filter(gray**2, 5) - uniform_filter(gray, 5) ** 2
    candidates = np.flatnonzero(~(near & (variance < 25)))
    if len(candidates) < 0.02 * gray.size:
        candidates = np.arange(gray.size)
    row, column = np.divmod(candidates[random.randint(len(candidates))], gray.shape[1])
    at = np.add((row, column), random.uniform(size=2)) * step
    return float(min(at[0], image.shape[0] - 1)), float(min(at[1], image.shape[1] - 1))


# --- shapes -----------------------------------------------------------------------------------


def _fractal(random: np.random.RandomState, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Draw Perlin-like noise (h, w) of mean 0 and deviation 1, with spots up to ``cell`` wide."""
    noise = np.zeros(shape)
    for octave in range(5):
        size = cell / 2**octave
        if octave and size < 1:
            break
        grid = random.standard_normal([int(side / max(size, 1)) + 2 for side in shape])
        noise += np.asarray(_resize(grid, shape)) / 2**octave
    noise -= noise.mean()
    return np.asarray(noise / max(noise.std(), 1e-9))


def _resize(grid: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(grid.astype(np.float32))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BICUBIC))


def _blob(place: Place, *, ragged: float, edge: float, share: float = 1.0) -> np.ndarray:
    """Draw a spot as opacity (h, w) in [0, 1]: an ellipse plus noise, thresholded."""
    random = place.random
    area = max(share * place.area, _LEAST_AREA)
    radius = np.sqrt(area / np.pi)
    angle, stretch = random.uniform(0, np.pi), np.exp(random.uniform(0, 0.45))
    y, x = (np.arange(n) - c for n, c in zip(place.shape, place.center, strict=True))
    u = (np.cos(angle) * y[:, None] + np.sin(angle) * x) * stretch
    v = (np.cos(angle) * x - np.sin(angle) * y[:, None]) / stretch
    field = 1 - np.hypot(u, v) / radius + ragged * _fractal(random, place.shape, radius)
    n_inside = min(round(area), field.size)
    cut = np.partition(field.ravel(), -n_inside)[-n_inside]
    inside = np.clip(0.5 + (field - cut) * radius / edge, 0, 1)
    inside = inside**2 * (3 - 2 * inside)
    return np.asarray(inside / inside.max())


def _walk(headings: np.ndarray) -> np.ndarray:
    """Return points (n, 2), half a pixel apart, of a path with these headings."""
    return np.asarray(np.cumsum(0.5 * np.stack([np.sin(headings), np.cos(headings)], 1), axis=0))


# Points (n, 2), widths (n,) in pixels, and opacities (n,) in [0, 1].
_Stroke = tuple[np.ndarray, np.ndarray, np.ndarray]


def _draw(shape: tuple[int, int], strokes: list[_Stroke]) -> np.ndarray:
    """Draw strokes as opacity (h, w) in [0, 1]."""
    scale = int(np.clip(3000 // max(shape), 1, 4))  # drawn larger, for smooth edges
    canvas = Image.new("L", (shape[1] * scale, shape[0] * scale))
    draw = ImageDraw.Draw(canvas)
    for points, widths, levels in strokes:
        for (y, x), r, level in zip(
            (points + 0.5) * scale, widths * scale / 2, levels, strict=True
        ):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=int(255 * level))
    return np.asarray(canvas.reduce(scale), dtype=np.float64) / 255


# --- kinds ------------------------------------------------------------------------------------


def _replace(place: Place, opacity: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """Blend a patch (h, w, 3) in, with a shade if it hardly differs; return the change."""
    difference = patch - place.crop
    weights = opacity / opacity.sum()
    rms = np.sqrt((weights[..., None] * difference**2).sum() / 3)
    missing = max(0.0, 0.6 * place.contrast - rms)
    return np.asarray(opacity[..., None] * (difference + place.sign * missing))


def _patch(place: Place, turn: float, zoom: float) -> np.ndarray:
    """Cut a window (h, w, 3) out of a donor, turned by up to ``turn`` radians, zoomed, mirrored."""
    random, donor = place.random, place.donor()
    # The farthest of a few places: if the donor is the image itself, near ones look the same.
    places = [_on_object(random, donor) for _ in range(4)]
    at = max(places, key=lambda p: float(np.hypot(*np.subtract(p, place.at))))
    angle = random.uniform(-turn, turn)
    scale = np.exp(random.uniform(-1, 1) * np.log(zoom))
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix[:, 1] *= random.choice([-1, 1])
    offset = np.asarray(at) - matrix @ place.center
    channels = [
        affine_transform(
            donor[..., c].astype(np.float64), matrix, offset, place.shape, order=1, mode="mirror"
        )
        for c in range(3)
    ]
    return np.stack(channels, axis=-1)


def _noise(place: Place) -> np.ndarray:
    """Make noise with the mean and covariance of the colours around."""
    random = place.random
    opacity = _blob(place, ragged=random.uniform(0.3, 0.7), edge=2.0)
    near = gaussian_filter(opacity, 0.3 * np.sqrt(place.area)).ravel() + 1e-6
    colors = place.crop.reshape(-1, 3)
    covariance = np.cov(colors.T, aweights=near) + 0.01  # so that a flat image has one, of grays
    deviation = np.sqrt(np.trace(covariance) / 3)
    wanted = np.clip(deviation, 0.3 * place.contrast, 0.8 * place.contrast)
    colored = np.linalg.cholesky(covariance + 1e-6 * np.eye(3)) * wanted / deviation
    cell = np.exp(random.uniform(np.log(2), np.log(3 + 0.5 * np.sqrt(place.area))))
    noise = np.stack([_fractal(random, place.shape, cell) for _ in range(3)], axis=-1)
    patch = np.average(colors, axis=0, weights=near) + place.sign * 0.4 * place.contrast
    return _replace(place, opacity * (0.5 + 0.5 * place.severity), patch + noise @ colored.T)


def _texture(place: Place) -> np.ndarray:
    """Put another piece of material there, turned, zoomed, and with another contrast."""
    random = place.random
    patch = _patch(place, np.pi, 2.0)
    mean = patch.mean(axis=(0, 1))
    patch = mean + (patch - mean) * random.uniform(0.6, 1.5)
    patch += place.sign * place.contrast * random.uniform(0, 0.8)
    opacity = _blob(place, ragged=random.uniform(0.3, 0.7), edge=2.0)
    return _replace(place, opacity * (0.5 + 0.5 * place.severity), patch)


def _scratch(place: Place) -> np.ndarray:
    """Draw one to three nearly parallel grooves, tapered, pressed unevenly, lit from one side."""
    random = place.random
    n = max(4, int(2 * place.length))
    heading = random.uniform(0, 2 * np.pi)
    strokes: list[_Stroke] = []
    for _ in range(1 + random.binomial(2, 0.25)):
        smooth = [
            gaussian_filter1d(random.standard_normal(n), n / k, mode="nearest") for k in (4, 8, 20)
        ]
        bend, press, swell = (s / max(np.abs(s).max(), 1e-9) for s in smooth)
        points = _walk(heading + 0.5 * random.uniform() * bend)
        points += place.center - points[n // 2]
        begin = 0
        if strokes:  # others run beside the first, and are shorter
            points += random.normal(0, 3 * place.unit, 2)
            begin = int(random.uniform(0, 0.4) * n)
        taper = np.sin(np.linspace(0.05, np.pi - 0.05, n)) ** 0.4
        width = place.unit * random.uniform(0.8, 1.8) * taper * (1 + 0.3 * swell)
        level = np.clip(0.75 + 0.35 * press, 0.2, 1)
        strokes.append((points[begin:], width[begin:], level[begin:]))
    line = gaussian_filter(_draw(place.shape, strokes), 0.4)
    # One flank of a groove catches the light, the other lies in its shadow.
    flank = shift(line, 1.2 * place.unit * place.light, order=1) * (1 - line)
    return np.asarray(1.3 * place.sign * place.contrast * (line - 0.5 * flank)[..., None])


def _crack(place: Place) -> np.ndarray:
    """Draw a jagged dark line with branches that grow thinner, and a faint lip."""
    random = place.random
    strokes: list[_Stroke] = []
    twigs = [(place.center, random.uniform(0, 2 * np.pi), max(6, int(2 * place.length)), 1.0)]
    while twigs:
        start, heading, n, width = twigs.pop()
        jags = np.repeat(random.normal(0, 0.55, n), random.randint(3, 14, n))[:n]
        drift = 0.25 * np.cumsum(random.normal(0, 1, n)) / np.sqrt(n)
        points = _walk(heading + jags + drift) + start
        if not strokes:  # the first and longest has its middle there
            points += start - points[n // 2]
        ends = [1, 0.8, 0.35] if strokes else [0.4, 1, 0.35]
        taper = np.interp(np.linspace(0, 1, n), [0, 0.3, 1], ends) * random.uniform(0.8, 1.2, n)
        strokes.append((points, place.unit * width * taper, np.ones(n)))
        n_twigs = random.poisson(1.5) if len(strokes) + len(twigs) < 9 and n > 12 else 0
        for at in random.randint(n // 5, n, n_twigs):
            turn = random.choice([-1, 1]) * random.uniform(0.4, 1.2)
            n_steps = int((n - at) * random.uniform(0.4, 0.9)) + 3
            twigs.append((points[at], heading + turn, n_steps, 0.8 * width))
    line = _draw(place.shape, strokes)
    lip = shift(line, place.unit * place.light, order=1) * (1 - line)
    dark = np.maximum(0.25 * place.crop, place.crop - 2.2 * place.contrast) - place.crop
    return np.asarray(line[..., None] * dark + 0.25 * place.contrast * lip[..., None])


def _stain(place: Place) -> np.ndarray:
    """Put a film there that absorbs some colours more than others, or a bright haze."""
    random = place.random
    edge = random.uniform(0.15, 0.6) * np.sqrt(place.area) + 1.5
    film = _blob(place, ragged=random.uniform(0.15, 0.4), edge=edge)
    middle = gaussian_filter(film, 0.12 * np.sqrt(place.area) + 0.5)
    film = film * (1 - random.uniform(0, 0.6) * middle)  # what dries gathers at the rim
    film *= 1 + 0.12 * _fractal(random, place.shape, 0.5 * np.sqrt(place.area) + 2)
    film = np.clip(film / max(film.max(), 1e-9), 0, 1)
    if place.sign > 0:
        haze = place.crop.max(axis=(0, 1)) - place.crop
        return np.asarray(film[..., None] * (place.contrast + 0.2 * haze))
    absorbed = np.clip(1 + 0.25 * random.standard_normal(3), 0.3, 1.7)
    density = absorbed * 1.3 * place.contrast / max(place.level, 2 * place.contrast)
    return np.asarray(place.crop * (np.exp(-film[..., None] * density) - 1))


def _pit(place: Place) -> np.ndarray:
    """Make a dark hole with one rim lit and the other in the shadow."""
    random = place.random
    edge = min(0.15 * np.sqrt(place.area), 2 * place.unit) + 1
    depth = _blob(place, ragged=random.uniform(0.1, 0.3), edge=edge, share=0.3)
    smooth = gaussian_filter(depth, 0.5 * edge)
    bottom = gaussian_filter(place.crop, (0.2 * np.sqrt(place.area) + 1,) * 2 + (0,))
    bottom = 0.7 * (bottom - place.crop) - 1.2 * place.contrast
    return np.asarray(_relief(place, smooth) + (depth * smooth)[..., None] * bottom)


def _relief(place: Place, height: np.ndarray) -> np.ndarray:
    """Shade slopes by light and shadow (h, w, 1), up to the contrast."""
    slopes = np.tensordot(place.light, np.stack(np.gradient(height)), 1)
    return np.asarray(place.contrast * slopes / max(np.abs(slopes).max(), 1e-9))[..., None]


def _chip(place: Place) -> np.ndarray:
    """Cut out a polygon: the colour around it, shaded, with a bevelled edge."""
    random = place.random
    n = random.randint(4, 8)
    angles = (np.arange(n) + random.uniform(-0.35, 0.35, n)) * 2 * np.pi / n
    radii = random.uniform(0.6, 1.3, n)
    points = radii[:, None] * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    for amount in (0.10, 0.06, 0.03):  # broken edges are not straight
        middles = (points + np.roll(points, -1, axis=0)) / 2
        middles += amount * random.standard_normal(middles.shape)
        points = np.stack([points, middles], axis=1).reshape(-1, 2)
    y, x = points.T
    area = abs(y @ np.roll(x, 1) - x @ np.roll(y, 1)) / 2
    points = points * np.sqrt(place.area / area) + place.center + 0.5
    scale = int(np.clip(3000 // max(place.shape), 1, 4))
    canvas = Image.new("L", (place.shape[1] * scale, place.shape[0] * scale))
    ImageDraw.Draw(canvas).polygon([(x * scale, y * scale) for y, x in points], fill=255)
    inside = np.asarray(canvas.reduce(scale), dtype=np.float64) / 255
    around = gaussian_filter(inside, 2 + 0.2 * np.sqrt(place.area)) * (1 - inside) + 1e-9
    fill = np.average(place.crop.reshape(-1, 3), axis=0, weights=around.ravel())
    grain = 0.8 * place.grain * _fractal(random, place.shape, 2.0)
    grain += 0.12 * place.contrast * _fractal(random, place.shape, np.sqrt(place.area) + 2)
    patch = fill + place.sign * place.contrast + grain[..., None]
    bevel = _relief(place, gaussian_filter(inside, 0.6 * place.unit)) * inside[..., None]
    return _replace(place, inside, patch) + 0.8 * bevel


def _paste(place: Place) -> np.ndarray:
    """Paste a piece from elsewhere, a little warped, its colour matched in part, as in CutPaste."""
    random = place.random
    patch = _patch(place, 0.4, 1.25)
    opacity = _blob(place, ragged=random.uniform(0.1, 0.4), edge=3.0)
    near, under = (np.average(x, axis=(0, 1), weights=opacity) for x in (place.crop, patch))
    patch += 0.6 * (near - under) + place.sign * place.contrast * random.uniform(0.1, 0.5)
    return _replace(place, opacity, patch)


def _transplant(place: Place) -> np.ndarray:
    """Blend in a turned piece from elsewhere without a step at its edge, as in NSA."""
    random = place.random
    patch = _patch(place, np.pi, 1.5)
    opacity = _blob(place, ragged=random.uniform(0.1, 0.4), edge=3.0)
    # The difference along the seam, spread inwards smoothly, stands in for Poisson blending.
    seam = (opacity * (1 - opacity))[..., None] + 1e-6
    width = (0.25 * np.sqrt(place.area) + 1,) * 2 + (0,)
    membrane = gaussian_filter(seam * (place.crop - patch), width) / gaussian_filter(seam, width)
    return _replace(place, opacity, patch + membrane)


MAKERS: dict[str, Callable[[Place], np.ndarray]] = {
    "noise": _noise,
    "texture": _texture,
    "scratch": _scratch,
    "crack": _crack,
    "stain": _stain,
    "pit": _pit,
    "chip": _chip,
    "paste": _paste,
    "transplant": _transplant,
}
