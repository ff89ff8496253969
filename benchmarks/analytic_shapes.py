"""Balls, ellipsoids and boxes whose surfaces are known: inside or not, points by area, distance to the surface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SPACINGS = ((1.0, 1.0, 1.0), (1.0, 1.0, 3.0), (0.8, 0.8, 2.5))


@dataclass(frozen=True)
class Shape:
    """Centre, half axes and rotation in mm."""

    centre: np.ndarray
    half: np.ndarray
    rotation: np.ndarray

    def local(self, points: np.ndarray) -> np.ndarray:
        """Return points in the shape's own axes."""
        return (points - self.centre) @ self.rotation

    def reach(self) -> float:
        """Return the largest coordinate that the shape can have."""
        return float(np.linalg.norm(self.half) + np.abs(self.centre).max())


class Ellipsoid(Shape):
    """An ellipsoid; a ball where the half axes are equal."""

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Return which points are inside."""
        return ((self.local(points) / self.half) ** 2).sum(-1) <= 1

    def surface(self, n: int = 200_000) -> tuple[np.ndarray, np.ndarray]:
        """Return points on the surface and the area that each stands for."""
        k = np.arange(n) + 0.5
        z, angle = 1 - 2 * k / n, np.pi * (1 + np.sqrt(5)) * k
        unit = np.stack([np.sqrt(1 - z * z) * np.cos(angle), np.sqrt(1 - z * z) * np.sin(angle), z], axis=1)
        area = 4 * np.pi / n * np.prod(self.half) * np.linalg.norm(unit / self.half, axis=1)
        return unit * self.half @ self.rotation.T + self.centre, area

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Return the distance to the surface, by bisection for the foot of the perpendicular."""
        local, half2 = np.abs(self.local(points)), self.half**2
        low = np.full(len(local), 1e-12 - half2.min())
        high = np.linalg.norm(local * self.half, axis=1) + 1
        for _ in range(100):
            middle = (low + high) / 2
            beyond = ((self.half * local / (middle[:, None] + half2)) ** 2).sum(axis=1) > 1
            low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
        return np.linalg.norm(half2 * local / (low[:, None] + half2) - local, axis=1)


class Box(Shape):
    """A box."""

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Return which points are inside."""
        return (np.abs(self.local(points)) <= self.half).all(-1)

    def surface(self, n: int = 200_000) -> tuple[np.ndarray, np.ndarray]:
        """Return points on the surface and the area that each stands for; the corners too, for a Hausdorff distance."""
        m = int(np.sqrt(n / 6))
        side = (np.arange(m) + 0.5) / m * 2 - 1
        u, v = (a.ravel() for a in np.meshgrid(side, side))
        points, areas = [], []
        for axis in range(3):
            first, second = (a for a in range(3) if a != axis)
            for sign in (-1.0, 1.0):
                face = np.zeros((m * m, 3))
                face[:, axis], face[:, first], face[:, second] = sign, u, v
                points.append(face * self.half)
                areas.append(np.full(m * m, 4 * self.half[first] * self.half[second] / m**2))
        corners = np.stack(np.meshgrid(*[(-1.0, 1.0)] * 3), axis=-1).reshape(-1, 3)
        points.append(corners * self.half)
        areas.append(np.zeros(len(corners)))
        return np.concatenate(points) @ self.rotation.T + self.centre, np.concatenate(areas)

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Return the distance to the surface."""
        beyond = np.abs(self.local(points)) - self.half
        return np.where((beyond <= 0).all(-1), -beyond.max(-1), np.linalg.norm(np.maximum(beyond, 0), axis=-1))


def pairs(seed: int = 0) -> Iterator[tuple[str, tuple[float, ...], Shape, Shape, tuple[float, ...]]]:
    """Yield family, spacing, prediction, reference and tolerances in mm; places within a voxel and rotations random."""
    rng = np.random.default_rng(seed)
    straight = np.eye(3)
    for spacing in SPACINGS:
        for _ in range(2):
            c = rng.uniform(-0.5, 0.5, 3) * spacing
            turned = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            moved = c + np.array([1.5, 1.0, 0.5])
            both = ((0.5, 1.0, 1.5),) * 2
            for family, kind, rotation, half, other, tolerances in (
                ("balls", Ellipsoid, straight, [12, 12, 12], [13.5, 13.5, 13.5], ((1.2, 1.8), (0.5, 1.0, 1.5))),
                ("small balls", Ellipsoid, straight, [3.5, 3.5, 3.5], [4.5, 4.5, 4.5], ((0.7, 1.3), (0.5, 1.0, 1.5))),
                ("ellipsoids", Ellipsoid, turned, [15, 11, 7], [16, 12, 8.5], both),
                ("boxes", Box, straight, [11, 8, 9], [12.5, 9.5, 10.5], ((1.2, 1.8), (0.3, 1.2, 1.7))),
                ("turned boxes", Box, turned, [11, 8, 9], [12.5, 9.5, 10.5], ((1.2, 1.8), (0.5, 1.0, 1.5))),
            ):
                half_a, half_b = np.array(half, float), np.array(other, float)
                yield family, spacing, kind(c, half_a, rotation), kind(c, half_b, rotation), tolerances[0]
                yield family, spacing, kind(c, half_a, rotation), kind(moved, half_a, rotation), tolerances[1]


def rasterise(first: Shape, second: Shape, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return both masks: the voxels whose centre is inside."""
    reach = max(first.reach(), second.reach())
    axes = [np.arange(-np.ceil(reach / s) - 2, np.ceil(reach / s) + 3) * s for s in spacing]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return first.inside(grid), second.inside(grid)
