"""Scenes as pictures: PNG bytes, object boxes, and features of regions for the models that read regions."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

from itm.data.sources.scene_world import COLOURS, SHAPES

SIDE = 64  # pixels
REGIONS = 6  # a picture: two objects and four distractors
FEATURES = 358  # thumbnail 192, histogram 64, HOG 81, box 7, bumps 14
_OVERSAMPLE = 3
_CROP = 24
_RGB = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "orange": (245, 135, 25),
}


def render(slots: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scene slots (5,) -> (picture (64,64,3) uint8, boxes (2,4) float in [0,1], A first)."""
    centres, halves = _layout(int(slots[4]), rng)
    background = rng.uniform(95, 160) + rng.uniform(-10, 10, 3)
    canvas = Image.new("RGB", (SIDE * _OVERSAMPLE,) * 2, tuple(int(v) for v in background))
    draw = ImageDraw.Draw(canvas)
    for colour, shape, centre, half in zip(slots[[0, 2]], slots[[1, 3]], centres, halves, strict=True):
        _draw(draw, SHAPES[shape], _RGB[COLOURS[colour]], centre * _OVERSAMPLE, half * _OVERSAMPLE)
    picture = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    picture = np.clip(picture + rng.uniform(-8, 8, picture.shape), 0, 255).round().astype(np.uint8)
    reach = halves[:, None] + 1
    return picture, np.concatenate([centres - reach, centres + reach], 1) / SIDE


def to_png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def propose(boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(6,4) boxes in [0,1] in random order: the two true ones jittered by 0.02, and four random ones of half-size .08 to .23."""
    true = boxes + rng.uniform(-0.02, 0.02, boxes.shape)
    half = rng.uniform(0.08, 0.23, (REGIONS - 2, 2))
    centre = rng.uniform(half, 1 - half)
    proposals = np.concatenate([true, np.concatenate([centre - half, centre + half], 1)])
    return np.clip(proposals, 0, 1)[rng.permutation(REGIONS)]


def describe(picture: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Raw features (R, 358) float32 of boxes (R,4) in [0,1]; where a region lies is part of its vector."""
    image = Image.fromarray(picture)
    return np.stack([_describe_one(image, box) for box in boxes]).astype(np.float32)


def _layout(relation: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centres (2,2) x y and half-sizes (2,) in pixels. The offset across the relation stays small: exactly one relation holds."""
    halves = rng.uniform(8, 12, 2)
    along, across = rng.uniform(26, 30) / 2, rng.uniform(-5, 5) / 2
    middle = SIDE / 2 + np.array([rng.uniform(-4, 4), rng.uniform(-14, 14)])
    centres = middle + np.array([[-along, -across], [along, across]])
    return np.clip(centres if relation == 0 else centres[:, ::-1], 13, 51), halves


def _draw(draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], centre: np.ndarray, half: float) -> None:
    x, y = centre
    if shape in ("circle", "ring"):
        draw.ellipse((x - half, y - half, x + half, y + half), None if shape == "ring" else colour, colour, max(1, int(half * 0.42)))
    elif shape == "square":
        draw.rectangle((x - half * 0.9, y - half * 0.9, x + half * 0.9, y + half * 0.9), colour)
    elif shape == "cross":
        draw.rectangle((x - half, y - half * 0.33, x + half, y + half * 0.33), colour)
        draw.rectangle((x - half * 0.33, y - half, x + half * 0.33, y + half), colour)
    else:
        radii = [1.0] * 3 if shape == "triangle" else [1.0, 0.42] * 5
        angles = np.arange(len(radii)) * 2 * np.pi / len(radii) - np.pi / 2
        points = centre + half * np.array(radii)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        draw.polygon([tuple(p) for p in points], colour)


def _describe_one(image: Image.Image, box: np.ndarray) -> np.ndarray:
    crop = image.resize((_CROP, _CROP), Image.Resampling.BILINEAR, tuple(box * SIDE))
    rgb = np.asarray(crop, np.float64) / 255
    thumbnail = rgb.reshape(8, 3, 8, 3, 3).mean((1, 3)).ravel() * 0.3
    bins = np.minimum((rgb * 4).astype(int), 3).reshape(-1, 3) @ (16, 4, 1)
    histogram = np.sqrt(np.bincount(bins, minlength=64) / len(bins))
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    grid = np.linspace(0, 1, 7)
    bumps = [np.exp(-((c - grid) ** 2) / 0.02) for c in ((x1 + x2) / 2, (y1 + y2) / 2)]
    return np.concatenate([thumbnail, histogram, _hog(rgb.mean(2)) * 1.5, [x1, y1, x2, y2, w, h, w * h], *bumps])


def _hog(grey: np.ndarray) -> np.ndarray:
    """Histogram of oriented gradients of a (24,24) picture: 3x3 cells x 9 unsigned orientations, L2-normalised as a whole."""
    dy, dx = np.gradient(grey)
    orientation = np.minimum((np.arctan2(dy, dx) % np.pi / np.pi * 9).astype(int), 8)
    cell = np.arange(_CROP) // (_CROP // 3)
    bins = (cell[:, None] * 3 + cell[None, :]) * 9 + orientation
    hog = np.bincount(bins.ravel(), np.hypot(dx, dy).ravel(), minlength=81)
    return hog / (np.linalg.norm(hog) + 1e-9)
