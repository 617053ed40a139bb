"""Pictures of results: heatmaps over photographs, and sheets of such pictures.

Colours are absolute. They depend on the threshold of the detector and not on the single image, so
one colour means one score in all pictures of one detector. Scores up to half the threshold are not
tinted, the threshold is the middle of the ramp, and scores from one and a half times the threshold
on have its bright end.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import maximum_filter, minimum_filter

from anomalib_lite._validation import check_int, check_number
from anomalib_lite.errors import ImageError, InvalidValueError
from anomalib_lite.images import ImageSource
from anomalib_lite.images.copies import Copies

__all__ = ["SCALE", "color_bar", "contact_sheet", "copies_sheet", "legend_colors", "overlay"]

# Ends of the scale, as multiples of the threshold. Maps are smoothed while image scores are maxima
# of raw patch scores, so the maximum of a map is some 5 to 15 % below the score of its image.
SCALE = (0.5, 1.5)

# The upper four fifths of matplotlib's inferno (CC0), evenly spaced: equal steps look equal and
# lightness only rises, so it is readable in gray print and with any colour vision. Its black end is
# left out because it would look like a shadow on the photograph.
_RAMP = (
    (0x42, 0x0A, 0x68),
    (0x6A, 0x17, 0x6E),
    (0x93, 0x26, 0x67),
    (0xBC, 0x37, 0x54),
    (0xDD, 0x51, 0x3A),
    (0xF3, 0x78, 0x19),
    (0xFC, 0xA5, 0x0A),
    (0xF6, 0xD7, 0x46),
    (0xFC, 0xFF, 0xA4),
)
_STEPS = np.linspace(0, 1, 256)
_COLORS = np.stack(
    [np.interp(_STEPS, np.linspace(0, 1, len(_RAMP)), channel) for channel in np.transpose(_RAMP)],
    axis=1,
)  # (256, 3)
# Opacity rises up to the threshold and is constant above it, so anomalous regions are fully
# coloured. The square keeps the normal variation of good parts faint.
_ALPHA = np.minimum(1, 2 * _STEPS) ** 2

_GAP = 12  # pixels between the pictures of a sheet
_PAPER, _INK = "#ffffff", "#1f2933"
_BAD, _GOOD = "#c62828", "#2e7d32"


def overlay(
    image: Any,
    heatmap: Any,
    *,
    threshold: float,
    pixel_threshold: float | None = None,
    score: float | None = None,
    outline: float | None = 1.0,
    gray: bool = True,
    opacity: float = 0.7,
) -> Image.Image:
    """Lay a heatmap over its photograph.

    Parameters
    ----------
    image : path, PIL image, array or tensor
        One image, of any kind that a detector accepts.
    heatmap : array of shape (H, W)
        Heatmap at the image's own size, in the units of the threshold, as returned by
        ``anomaly_map``.
    threshold : float
        The detector's ``threshold_``, finite and above 0, which the score is compared with.
    pixel_threshold : float, optional
        The detector's ``pixel_threshold_``, likewise: the middle of the colour scale. By default
        ``threshold``.
    score : float, optional
        Score of the image. If given, a strip below the picture shows the score, the threshold, and
        "anomalous" if the score exceeds the threshold, otherwise "normal".
    outline : float or None, default=1.0
        Level above which regions are outlined, as a multiple of ``pixel_threshold``; None for no
        outline.
    gray : bool, default=True
        Show the photograph in gray, so that every colour comes from the heatmap.
    opacity : float, default=0.7
        Opacity of the colours at the threshold and above, in [0, 1]; below the threshold they fade
        out.

    Returns
    -------
    PIL.Image.Image
        Mode RGB; W wide and H high, plus the strip. If the image is too narrow for the text of the
        strip, the picture is wider than the image.

    Raises
    ------
    ImageError
        If the image cannot be read, or the heatmap has another size or is not finite.
    InvalidValueError
        If ``threshold``, ``pixel_threshold``, ``outline`` or ``opacity`` is out of range.

    Notes
    -----
    The scale is absolute, from 0.5 to 1.5 times ``pixel_threshold`` (:data:`SCALE`), in all images
    of one detector; :func:`color_bar` draws it.

    Examples
    --------
    >>> import numpy as np
    >>> photo = np.full((60, 100, 3), 128, np.uint8)
    >>> heatmap = np.zeros((60, 100), np.float32)
    >>> heatmap[20:40, 30:60] = 3
    >>> overlay(photo, heatmap, threshold=2.0).size
    (100, 60)
    >>> overlay(photo, heatmap, threshold=2.0).getpixel((0, 0))
    (128, 128, 128)
    """
    limit = check_number("threshold", threshold, "overlay", "(0, inf)")
    level = limit
    if pixel_threshold is not None:
        level = check_number("pixel_threshold", pixel_threshold, "overlay", "(0, inf)")
    check_number("opacity", opacity, "overlay", "[0, 1]")
    # The heatmap already has the size of the image, so a second limit of the size is not needed.
    source = ImageSource(image, max_pixels=sys.maxsize, where="overlay")
    photo = _as_rgb(source.decode(0))
    values = _check_heatmap(heatmap, photo, source.names[0])
    picture = photo.convert("L").convert("RGB") if gray else photo
    low, high = (level * end for end in SCALE)
    step = (np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)  # (H, W)
    tint = Image.fromarray(np.rint(_COLORS).astype(np.uint8)[step])
    alpha = Image.fromarray(np.rint(255 * opacity * _ALPHA).astype(np.uint8)[step])
    picture = Image.composite(tint, picture, alpha)
    if outline is not None:
        above = check_number("outline", outline, "overlay", "[0, inf)") * level
        _draw_outline(picture, values > above)
    return picture if score is None else _with_strip(picture, float(score), limit)


def color_bar(threshold: float, *, width: int = 400) -> Image.Image:
    """Draw the colour scale of :func:`overlay`, as the colours look on mid gray.

    Parameters
    ----------
    threshold : float
        The detector's ``pixel_threshold_``.
    width : int, default=400
        Width in pixels, at least 380.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, 52 pixels high.

    Raises
    ------
    InvalidValueError
        If the threshold is not finite and above 0, or the width is too small.

    Examples
    --------
    >>> color_bar(25.9).size
    (400, 52)
    """
    level = check_number("threshold", threshold, "color_bar", "(0, inf)")
    check_int("width", width, "color_bar", low=380)
    bar = Image.new("RGB", (width, 52), _PAPER)
    draw, font, margin = ImageDraw.Draw(bar), _font(13), 8
    colors = legend_colors(width - 2 * margin)
    for x, color in enumerate(colors, start=margin):
        draw.line((x, 4, x, 21), fill=color)
    middle = width // 2
    draw.line((middle, 4, middle, 26), fill=_INK, width=2)
    # In words, because Pillow's built-in font has no sign for "at most".
    draw.text((margin, 30), f"to {level * SCALE[0]:.4g}", fill=_INK, font=font)
    draw.text((middle, 30), f"threshold {level:.4g}", fill=_INK, font=font, anchor="ma")
    end = f"from {level * SCALE[1]:.4g}"
    draw.text((width - margin, 30), end, fill=_INK, font=font, anchor="ra")
    return bar


def legend_colors(n: int = 17, *, opacity: float = 0.7) -> list[str]:
    """List the colours at even steps of the scale of :func:`overlay`, as they look on mid gray.

    Parameters
    ----------
    n : int, default=17
        Number of colours; the first is untinted gray, the middle one belongs to the threshold.
    opacity : float, default=0.7
        Opacity at the threshold and above, as in :func:`overlay`.

    Returns
    -------
    list of str
        ``"#rrggbb"``.

    Examples
    --------
    >>> legend_colors(3)
    ['#808080', '#c1604f', '#d7d999']
    """
    steps = np.linspace(0, 255, n).round().astype(int)
    alpha = opacity * _ALPHA[steps, None]
    blended = np.rint(alpha * _COLORS[steps] + (1 - alpha) * 128).astype(int)  # (n, 3)
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in blended]


def contact_sheet(
    tiles: Sequence[Image.Image],
    *,
    columns: int = 4,
    captions: Sequence[str] | None = None,
    title: str | None = None,
    tile_size: tuple[int, int] = (240, 240),
) -> Image.Image:
    """Arrange pictures in rows, each with its caption below it.

    Parameters
    ----------
    tiles : sequence of PIL images
        Pictures, at least one. Each is scaled to fit into ``tile_size``; its aspect ratio is kept.
    columns : int, default=4
        Number of pictures in a row.
    captions : sequence of str, optional
        One caption for each picture; long ones are broken into lines.
    title : str, optional
        Text above the rows.
    tile_size : (H, W), default=(240, 240)
        Largest size of a picture in pixels; both at least 16.

    Returns
    -------
    PIL.Image.Image
        Mode RGB. The width depends on ``columns`` and ``tile_size`` alone; each row is as high
        as its highest picture and its longest caption.

    Raises
    ------
    InvalidValueError
        If there is no picture, if the number of captions differs, or if a number is too small.

    Examples
    --------
    >>> from PIL import Image
    >>> tiles = [Image.new("RGB", (90, 60), "gray")] * 5
    >>> contact_sheet(tiles, columns=3, tile_size=(60, 90)).size
    (318, 156)
    """
    where = "contact_sheet"
    check_int("columns", columns, where, low=1)
    height, width = (check_int("tile_size", side, where, low=16) for side in tile_size)
    if not tiles:
        raise InvalidValueError(f"{where}: tiles is empty. Give at least one picture.")
    if captions is not None and len(captions) != len(tiles):
        raise InvalidValueError(
            f"{where}: captions must be one for each of {len(tiles)} tiles, got {len(captions)}."
        )
    font = _font(max(11, min(16, width // 15)))
    fitted = [_fit(tile, width, height) for tile in tiles]
    lines = [_wrap(text, font, width) for text in captions or [""] * len(tiles)]
    total = columns * (width + _GAP) + _GAP
    strips = [_heading(title, total)] if title else []
    for i in range(0, len(tiles), columns):
        row = slice(i, i + columns)
        strips.append(_row(fitted[row], lines[row], width, total, font))
    sheet = Image.new("RGB", (total, sum(strip.height for strip in strips) + _GAP), _PAPER)
    top = _GAP
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def copies_sheet(
    images: Any,
    copies: Copies,
    *,
    n_groups: int = 6,
    columns: int = 6,
    tile_size: tuple[int, int] = (160, 160),
) -> Image.Image:
    """Show the largest groups of copies, each group in a row.

    Parameters
    ----------
    images : images
        Those that were given to :func:`~anomalib_lite.images.copies.find_copies`.
    copies : Copies
        What it returned.
    n_groups : int, default=6
        At most so many groups, at least 1.
    columns : int, default=6
        At most so many images of a group, the first ones, at least 1.
    tile_size : (H, W), default=(160, 160)
        Largest size of a picture in pixels; both at least 16.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, with the names of the images, and the size of each group above its row.

    Raises
    ------
    InvalidValueError
        If the images are not as many as ``copies`` has, if no two images are in one group, or if
        a number is too small.
    AnomalibLiteError
        If an image that is shown cannot be read.

    Examples
    --------
    >>> import numpy as np
    >>> images = [np.full((60, 90), 20 * i, np.uint8) for i in (1, 2, 1)]
    >>> copies = Copies(np.array([0, 1, 0]), np.zeros(3, bool), ("a.png", "b.png", "c.png"), 0.5)
    >>> copies_sheet(images, copies, columns=2, tile_size=(60, 90)).width
    216
    """
    where = "copies_sheet"
    check_int("n_groups", n_groups, where, low=1)
    check_int("columns", columns, where, low=1)
    source = ImageSource(images, where=where)
    if len(source) != len(copies):
        raise InvalidValueError(
            f"{where}: images must be the {len(copies)} that the copies were found in, got "
            f"{len(source)}."
        )
    sheets = []
    for group in copies.largest(n_groups):
        shown = group[:columns]
        sheets.append(
            contact_sheet(
                [_as_rgb(source.decode(i)) for i in shown],
                columns=columns,
                captions=[PurePath(copies.names[i]).name for i in shown],
                title=f"{len(group)} images of group {copies.groups[group[0]]}",
                tile_size=tile_size,
            )
        )
    if not sheets:
        raise InvalidValueError(f"{where}: no two images are in one group: nothing to show.")
    whole = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), _PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _check_heatmap(heatmap: Any, photo: Image.Image, name: str) -> np.ndarray:
    values = np.asarray(heatmap, dtype=np.float32)
    if values.shape != (photo.height, photo.width):
        raise ImageError(
            f"overlay: the heatmap of {name} must have the image's size "
            f"{photo.height}x{photo.width}, got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        raise ImageError(f"overlay: the heatmap of {name} must be finite, got NaN or infinity.")
    return values


def _as_rgb(decoded: Any) -> Image.Image:
    if isinstance(decoded, Image.Image):
        return decoded
    return Image.fromarray(np.rint(decoded * 255).astype(np.uint8))


def _draw_outline(picture: Image.Image, region: np.ndarray) -> None:
    """Draw a white line inside the edge of the region and a dark one outside.

    One of them is visible on any background.
    """
    size = 2 * max(1, round(min(picture.size) / 200)) + 1
    inside = region & ~minimum_filter(region, size)
    outside = maximum_filter(region, size) & ~region
    picture.paste(_INK, mask=Image.fromarray(outside))
    picture.paste(_PAPER, mask=Image.fromarray(inside))


def _with_strip(picture: Image.Image, score: float, threshold: float) -> Image.Image:
    """Add a strip of text below the picture."""
    font = _font(max(11, min(picture.width // 24, picture.height // 12)))
    line_height = _line_height(font)
    pad, gap = line_height // 2, 0.8 * line_height
    color, label = (_BAD, "anomalous") if score > threshold else (_GOOD, "normal")
    words = [label, f"score {score:.4g}", f"threshold {threshold:.4g}"]
    width = max(picture.width, 2 * pad + math.ceil(max(map(font.getlength, words))))
    lines: list[list[tuple[float, str]]] = [[]]
    x: float = pad
    for word in words:
        if lines[-1] and x + font.getlength(word) > width - pad / 2:
            lines.append([])
            x = pad
        lines[-1].append((x, word))
        x += font.getlength(word) + gap
    height = len(lines) * line_height + pad
    ground = Image.new("RGB", (width, picture.height + height), _PAPER)
    ground.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(ground)
    draw.rectangle((0, picture.height, pad // 2 - 1, ground.height), fill=color)
    y = picture.height + (pad + line_height) // 2
    for i, line in enumerate(lines):
        for x, word in line:
            fill = color if word == label else _INK
            draw.text((x, y + i * line_height), word, fill=fill, font=font, anchor="lm")
    return ground


def _fit(tile: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / tile.width, height / tile.height)
    size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
    return tile.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _heading(title: str, total: int) -> Image.Image:
    font = _font(20)
    lines = _wrap(title, font, total - 2 * _GAP)
    heading = Image.new("RGB", (total, len(lines) * _line_height(font) + _GAP), _PAPER)
    for i, line in enumerate(lines):
        ImageDraw.Draw(heading).text((_GAP, i * _line_height(font)), line, fill=_INK, font=font)
    return heading


def _row(
    tiles: list[Image.Image], lines: list[list[str]], width: int, total: int, font: Any
) -> Image.Image:
    """Draw one row of a sheet, with the gap below it."""
    height, line_height = max(tile.height for tile in tiles), _line_height(font)
    text_height = max(map(len, lines)) * line_height
    row = Image.new("RGB", (total, height + text_height + _GAP), _PAPER)
    draw = ImageDraw.Draw(row)
    for column, (tile, text) in enumerate(zip(tiles, lines, strict=True)):
        middle = _GAP + column * (width + _GAP) + width // 2
        # Pictures of one row are aligned at the bottom, so that their captions begin on one line.
        row.paste(tile, (middle - tile.width // 2, height - tile.height))
        for i, line in enumerate(text):
            y = height + i * line_height + line_height // 4
            draw.text((middle, y), line, fill=_INK, font=font, anchor="ma")
    return row


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Break a text into lines no wider than ``width``; wider words are broken too."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if font.getlength(joined) <= width:
            lines[-1:] = [joined]
            continue
        lines.append("")
        for character in word:
            if font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _line_height(font: Any) -> int:
    return round(1.4 * float(font.size))
