"""Cuts polygons into triangles. Called by the readers of OFF, OBJ and PLY files."""

from collections.abc import Sequence

import numpy as np


def triangulate(polygons: Sequence[Sequence[int]], vertices: np.ndarray) -> np.ndarray:
    """Cut polygons of k corners into k - 2 triangles each: a fan around the first corner, or ears where that would leave the polygon.

    Args:
        polygons: indices of their corners, in order; those of one or two corners have no area and are passed over.
        vertices: (V, 3), of which the polygons name none that is not there.
    Returns:
        (T, 3) int64, polygon by polygon.
    """
    sizes = np.maximum([len(corners) - 2 for corners in polygons], 0)
    triangles = np.array([(corners[0], *edge) for corners in polygons for edge in zip(corners[1:], corners[2:], strict=False)], np.int64)
    if sizes.max(initial=0) < 2:
        return triangles.reshape(-1, 3)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    normals = np.cross(*(vertices[triangles[:, side]] - vertices[triangles[:, 0]] for side in (1, 2)))
    total = np.zeros((len(sizes), 3))
    np.add.at(total, owner, normals)  # twice the area of a polygon, along its normal, however it is cut
    along = (normals * total[owner]).sum(axis=1)
    for number in np.unique(owner[along < -1e-9 * np.square(total[owner]).sum(axis=1)]):
        triangles[owner == number] = _ears(np.asarray(polygons[number]), vertices[polygons[number]], total[number])
    return triangles


def _ears(corners: np.ndarray, places: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Cut a polygon ear by ear, at places (k, 3); a corner is an ear if it turns with the normal and its triangle holds no other corner."""
    inside = lambda one, two, point: np.cross(two - one, point - one) @ normal  # > 0 on the inner side of an edge
    left, cut = list(range(len(corners))), []
    while len(left) > 3:
        for place in range(len(left)):
            ear = [left[place - 1], left[place], left[(place + 1) % len(left)]]
            first, tip, last = places[ear]
            others = places[[corner for corner in left if corner not in ear]]
            held = np.minimum.reduce([inside(*edge, others) for edge in ((first, tip), (tip, last), (last, first))]) >= 0
            if inside(first, tip, last) > 0 and not held.any():
                break
        else:
            place = 1  # it crosses itself or has no area: no cut is right
            ear = left[:3]
        cut.append(ear)
        del left[place]
    return corners[[*cut, left]]
