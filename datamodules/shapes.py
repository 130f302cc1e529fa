"""Procedural scenes: one object on a textured ground, with its mask. No download.

Every image is a function of (split, index): its size and aspect, the texture of the ground and
of the object, clutter, and where, how large and how turned the object is. Object and ground draw
their textures from one and the same distribution, and clutter (small plain discs) from the same
colours, so that only the outline tells the class.
"""

import math
from typing import NamedTuple

import numpy as np

from datamodules.sampling import fold
from datamodules.sources import Example, Split, refuse_root, with_channels

CLASSES: tuple[str, ...] = (
    *("disc", "square", "triangle", "star", "cross"),
    *("ring", "crescent", "heart", "arrow", "bow tie"),
)
SPLITS = {"train": 0x7261, "val": 0x6C76}


def inside_polygon(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Points inside a polygon, by the even-odd rule."""
    inside: np.ndarray = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 == y1:
            continue
        crosses = (y >= min(y0, y1)) & (y < max(y0, y1))
        inside ^= crosses & (x < x0 + (y - y0) * ((x1 - x0) / (y1 - y0)))
    return inside


def star(points: int, inner: float) -> list[tuple[float, float]]:
    angles = [math.pi * i / points for i in range(2 * points)]
    radii = [1.0 if i % 2 == 0 else inner for i in range(2 * points)]
    return [(r * math.sin(a), r * math.cos(a)) for a, r in zip(angles, radii, strict=True)]


POLYGONS = {
    "square": [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)],
    "triangle": [(0.0, 1.0), (0.95, -0.7), (-0.95, -0.7)],
    "star": star(5, 0.42),
    "arrow": [
        *((-0.3, -1.0), (0.3, -1.0), (0.3, 0.05), (0.85, 0.05)),
        *((0.0, 1.0), (-0.85, 0.05), (-0.3, 0.05)),
    ],
    "bow tie": [(-1.0, -0.75), (0.0, -0.12), (1.0, -0.75), (1.0, 0.75), (0.0, 0.12), (-1.0, 0.75)],
}


def inside_shape(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Points inside the outline of a class, within the circle of radius 1 or just about."""
    if name in POLYGONS:
        return inside_polygon(x, y, POLYGONS[name])
    radius = x * x + y * y
    if name == "disc":
        return np.asarray(radius < 0.81)
    if name == "ring":
        return np.asarray((radius < 0.95) & (radius > 0.3))
    if name == "cross":
        ax, ay = np.abs(x), np.abs(y)
        return np.asarray((np.minimum(ax, ay) < 0.3) & (np.maximum(ax, ay) < 0.95))
    if name == "crescent":
        return np.asarray((radius < 0.95) & ((x - 0.5) ** 2 + y * y > 0.6))
    assert name == "heart"
    x, y = 1.25 * x, 1.25 * y + 0.15
    heart: np.ndarray = (x * x + y * y - 1) ** 3 < x * x * y**3
    return heart


class Frame(NamedTuple):
    """Where an object is: centre, half size in pixels, and a turn in radians."""

    row: float
    column: float
    radius: float
    angle: float


def draw(name: str, height: int, width: int, frame: Frame) -> np.ndarray:
    """The mask [height, width] of a shape; only the pixels around it are computed."""
    mask = np.zeros((height, width), dtype=bool)
    reach = 1.3 * frame.radius
    top, bottom = max(0, int(frame.row - reach)), min(height, math.ceil(frame.row + reach) + 1)
    left, right = max(0, int(frame.column - reach)), min(width, math.ceil(frame.column + reach) + 1)
    dy = (np.arange(top, bottom)[:, None] - frame.row) / frame.radius
    dx = (np.arange(left, right)[None, :] - frame.column) / frame.radius
    cos, sin = math.cos(frame.angle), math.sin(frame.angle)
    mask[top:bottom, left:right] = inside_shape(name, cos * dx + sin * dy, cos * dy - sin * dx)
    return mask


def draw_texture(height: int, width: int, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A float32 [height, width, 3] pattern: two waves around a random colour."""
    down, across = [], []  # sin(a + b) = sin a cos b + cos a sin b: no sine of every pixel
    for _ in range(2):
        wavelength, angle, phase = rng.uniform((3.0, 0.0, 0.0), (16.0, math.pi, 2 * math.pi))
        pace = 2 * math.pi / wavelength
        a = np.arange(height) * (pace * math.sin(angle)) + phase
        b = np.arange(width) * (pace * math.cos(angle))
        down += [np.sin(a), np.cos(a)]
        across += [np.cos(b), np.sin(b)]
    value = (np.stack(down, axis=1) @ np.stack(across)).astype(np.float32)
    if rng.random() < 0.5:  # stripes with hard edges
        value = np.sign(value) * np.float32(1.2)
    color = rng.uniform(0, 255, 3).astype(np.float32)
    swing = (strength * rng.uniform(-45, 45, 3)).astype(np.float32)
    pixels: np.ndarray = value[:, :, None] * (np.float32(0.5) * swing)
    pixels += color
    return pixels


class Shapes:
    """The scenes of one split; classes take turns.

    Args:
        num_train, num_val: how many images.
        min_side, max_side: the square root of an image's area in pixels, uniform between them.
        max_aspect: width / height is log-uniform between 1 / max_aspect and max_aspect.
        texture: strength of the waves on ground and object; 0 leaves plain colours, whose
            outlines a small network learns in minutes.

    Raises:
        ValueError: sizes out of order or too small to show a shape.
    """

    class_names = CLASSES

    def __init__(
        self,
        split: Split,
        root: str | None,
        channels: int,
        num_train: int = 10_000,
        num_val: int = 2_000,
        min_side: int = 64,
        max_side: int = 64,
        max_aspect: float = 1.0,
        texture: float = 1.0,
    ) -> None:
        refuse_root("shapes", root)
        if not 16 <= min_side <= max_side:
            raise ValueError(
                f"min_side {min_side} and max_side {max_side}: expected 16 <= min <= max"
            )
        if max_aspect < 1.0:
            raise ValueError(f"max_aspect is {max_aspect}; expected at least 1")
        if texture < 0:
            raise ValueError(f"texture is {texture}; expected 0 or more")
        if min(num_train, num_val) < 1:
            raise ValueError(f"num_train {num_train} and num_val {num_val}: expected at least 1")
        self.split, self.channels = split, channels
        self.length = num_train if split == "train" else num_val
        self.sides, self.max_aspect, self.texture = (min_side, max_side), max_aspect, texture

    def __len__(self) -> int:
        return self.length

    def describe(self, index: int) -> str:
        return f"shapes/{self.split}[{index}]"

    def __getitem__(self, index: int) -> Example:
        rng = self.generator(index)
        label = index % len(CLASSES)
        height, width = self.draw_size(rng)
        image = draw_texture(height, width, rng, self.texture)
        for _ in range(4):  # clutter
            spot = draw("disc", height, width, self.frame(height, width, rng, 0.03, 0.08))
            image[spot] = rng.uniform(0, 255, 3)
        mask = draw(CLASSES[label], height, width, self.frame(height, width, rng, 0.26, 0.42))
        inside = draw_texture(height, width, rng, self.texture)
        np.copyto(image, inside, where=mask[:, :, None])
        image += 8 * rng.standard_normal(image.shape, dtype=np.float32)
        pixels = with_channels(image.clip(0, 255, out=image).astype(np.uint8), self.channels)
        return Example(pixels, label, mask)

    def size(self, index: int) -> tuple[int, int]:
        return self.draw_size(self.generator(index))

    def generator(self, index: int) -> np.random.Generator:
        """All random numbers of one scene; the first of them give its size."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        return np.random.Generator(np.random.Philox(key=fold(SPLITS[self.split], index)))

    def draw_size(self, rng: np.random.Generator) -> tuple[int, int]:
        side = rng.uniform(self.sides[0], self.sides[1] + 1e-9)
        root = math.exp(0.5 * math.log(self.max_aspect) * rng.uniform(-1, 1))
        return max(16, round(side / root)), max(16, round(side * root))

    def frame(
        self, height: int, width: int, rng: np.random.Generator, smallest: float, largest: float
    ) -> Frame:
        """A place within the image for a shape of such a half size, relative to its short side."""
        short = min(height, width)
        radius = max(2.0, short * rng.uniform(smallest, largest))
        row = rng.uniform(radius, max(radius, height - radius))
        column = rng.uniform(radius, max(radius, width - radius))
        return Frame(row, column, radius, rng.uniform(-0.6, 0.6))
