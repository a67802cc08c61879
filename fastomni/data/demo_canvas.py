"""Painting smooth-edged shapes over all frames of a clip at once.

Colours are kept as three planes and a shape is painted only inside its window, the smallest
rectangle of pixels that holds it in every frame: that, and no loop over frames or pixels, is what
makes a clip cost a few milliseconds.

Shapes: F frames; planes are float32 [F, height, width] in 0..255.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Colour = tuple[float, float, float]
Planes = NDArray[np.float32]


@dataclass(frozen=True)
class Placement:
    """Where the head is in each frame: pixels, radians; arrays are float32 [F]."""

    centre_x: NDArray[np.float32]
    centre_y: NDArray[np.float32]
    angle: NDArray[np.float32]
    radius: float
    """Half the head's height."""

    @staticmethod
    def draw(
        size: tuple[int, int], frames: int, frames_per_second: int, rng: np.random.Generator
    ) -> Placement:
        """Draw a place, a size (80 to 90 % of the height where the width allows) and a sway.

        Args:
            size: (height, width) in pixels.
            frames: number of frames.
            frames_per_second: their rate.
            rng: the clip's generator.

        Returns:
            The placement.
        """
        height, width = size
        radius = 0.5 * rng.uniform(0.8, 0.9) * min(height, width / 0.8)
        room = np.maximum(0.5 * np.array([width - 1.6 * radius, height - 2 * radius]), 0.0)
        place = 0.5 * np.array([width, height]) + rng.uniform(-0.5, 0.5, 2) * room
        seconds = np.arange(frames) / frames_per_second
        rates = rng.uniform(0.3, 0.9, 3)[:, None]
        phases = rng.uniform(0.0, 1.0, 3)[:, None]
        sway = np.sin(2 * np.pi * (rates * seconds + phases))
        reach = rng.uniform(0.01, 0.04, 2)[:, None] * radius
        angle = rng.uniform(-0.06, 0.06) + rng.uniform(0.01, 0.05) * sway[2]
        moved = (place[:, None] + reach * sway[:2]).astype(np.float32)
        return Placement(moved[0], moved[1], angle.astype(np.float32), float(radius))


@dataclass(frozen=True)
class Grid:
    """A window of the canvas with its face coordinates; arrays are float32 [F, h, w]."""

    u: Planes
    v: Planes
    planes: tuple[Planes, Planes, Planes]
    radius: float

    def paint(
        self, inside: NDArray[np.floating[Any]], colour: Colour, opacity: float = 1.0
    ) -> None:
        """Blend a colour over the pixels of a shape.

        Args:
            inside: signed distance to the edge, positive inside, in face units [F, h, w].
            colour: red, green, blue in 0..255.
            opacity: 0 for nothing, 1 for solid.
        """
        cover = inside * np.float32(self.radius)
        cover += np.float32(0.5)
        np.clip(cover, 0.0, 1.0, out=cover)
        if opacity != 1.0:
            cover *= np.float32(opacity)
        change = np.empty_like(self.u)
        for plane, channel in zip(self.planes, colour, strict=True):
            np.subtract(np.float32(channel), plane, out=change)
            change *= cover
            plane += change


class Canvas:
    """The picture of a clip while it is painted.

    Args:
        size: (height, width) in pixels.
        placement: where the head is in each frame.
    """

    def __init__(self, size: tuple[int, int], placement: Placement) -> None:
        height, width = size
        frames = len(placement.angle)
        self.placement = placement
        self.planes = np.empty((3, frames, height, width), dtype=np.float32)
        x = (np.arange(width, dtype=np.float32) + 0.5)[None, None, :]
        y = (np.arange(height, dtype=np.float32) + 0.5)[None, :, None]
        x = (x - placement.centre_x[:, None, None]) / np.float32(placement.radius)
        y = (y - placement.centre_y[:, None, None]) / np.float32(placement.radius)
        cosine = np.cos(placement.angle)[:, None, None]
        sine = np.sin(placement.angle)[:, None, None]
        self.u: Planes = cosine * x + sine * y
        self.v: Planes = cosine * y - sine * x

    def window(self, left: float, right: float, top: float, bottom: float) -> Grid:
        """Cut out the pixels that a rectangle in face coordinates may touch in any frame."""
        place = self.placement
        corners = np.array([[left, top], [right, top], [left, bottom], [right, bottom]])
        cosine, sine = np.cos(place.angle), np.sin(place.angle)
        x = place.centre_x + place.radius * (corners[:, :1] * cosine - corners[:, 1:] * sine)
        y = place.centre_y + place.radius * (corners[:, :1] * sine + corners[:, 1:] * cosine)
        height, width = self.u.shape[1:]
        columns = slice(max(0, int(x.min()) - 1), max(0, min(width, int(x.max()) + 2)))
        rows = slice(max(0, int(y.min()) - 1), max(0, min(height, int(y.max()) + 2)))
        red, green, blue = self.planes[:, :, rows, columns]
        return Grid(
            self.u[:, rows, columns], self.v[:, rows, columns], (red, green, blue), place.radius
        )

    def background(
        self, colours: tuple[Colour, ...], plain: bool, rng: np.random.Generator
    ) -> None:
        """Fill the canvas: one colour, or a gradient with discs and a bar; still in all frames.

        Args:
            colours: what to choose from.
            plain: one colour only.
            rng: the clip's generator.
        """
        height, width = self.u.shape[1:]
        palette = np.array(colours, dtype=np.float32)[rng.permutation(len(colours))]
        palette = np.clip(palette + rng.uniform(-14, 14, palette.shape), 0, 255)
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        turn = rng.uniform(0, 2 * np.pi)
        slope = 0.5 + 0.35 * (np.cos(turn) * x + np.sin(turn) * y)
        if plain:
            slope = 0.08 * slope
        wall = palette[0][:, None, None] * (1 - slope) + palette[1][:, None, None] * slope
        if not plain:
            for colour in palette[1:4]:
                centre = rng.uniform(-1.1, 1.1, 2)
                disc = rng.uniform(0.2, 0.6) - np.hypot(x - centre[0], y - centre[1])
                bar = 0.14 - np.abs(x * np.sin(turn) - y * np.cos(turn) - centre[0])
                shape = disc if rng.random() < 0.6 else bar
                cover = 0.75 * np.clip(shape * 0.5 * height + 0.5, 0, 1)
                wall += cover * (colour[:, None, None] - wall)
        self.planes[:] = wall[:, None]

    def develop(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Apply light and grain, and return the pictures.

        Args:
            rng: the clip's generator.

        Returns:
            Pictures [F, height, width, 3] uint8 RGB.
        """
        frames, height, width = self.u.shape
        light = np.float32(rng.uniform(0.82, 1.08))
        tint = rng.uniform(0.96, 1.04, 3).astype(np.float32)
        # Four sheets of grain taken in turn: fresh noise in every frame would cost more than
        # all shapes together.
        strength = np.float32(rng.uniform(0.5, 4.0))
        grain = strength * rng.standard_normal((4, height, width), dtype=np.float32)
        pictures = np.empty((frames, height, width, 3), dtype=np.uint8)
        for channel in range(3):
            plane = self.planes[channel]
            plane *= light * tint[channel]
            plane += grain[np.arange(frames) % 4]
            pictures[..., channel] = np.clip(plane, 0, 255, out=plane)
        return pictures
