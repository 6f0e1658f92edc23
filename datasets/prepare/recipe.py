"""What is made of one shape: pictures, a cloud and faces, in the sizes that a command's options set. Called by the commands."""

import argparse
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from datasets.arrays import box_centre
from datasets.prepare.shapes.looks import Part
from datasets.prepare.shapes.mesh import farthest_points, normalise, sample_surface, simplified_faces
from datasets.prepare.shapes.render import luminance, render_views, ring_of_cameras, splat_views
from utils.errors import UserError

CANDIDATES = 4  # points drawn per point kept by farthest-point sampling
SAMPLINGS = ("farthest", "surface")
MESH_SIZE, SPLAT_SIZE = 224, 112  # pixels; a thousand points do not fill more


@dataclass(frozen=True)
class Recipe:
    """What decides the content of the files, apart from the source; passed to the worker processes."""

    size: int
    views: int
    elevation: float
    num_points: int | None
    sampling: str | None
    max_faces: int | None
    seed: int

    @classmethod
    def of(cls, options: argparse.Namespace, meshes: bool, **changes: Any) -> Self:
        """Return what a command's options say of meshes or of clouds; `changes` take the place of some."""
        given = {field.name: getattr(options, field.name) for field in fields(cls)}
        given["size"] = options.size or (MESH_SIZE if meshes else SPLAT_SIZE)
        if not meshes:
            given["max_faces"] = None
        return cls(**{**given, **changes})

    def __post_init__(self) -> None:
        ring_of_cameras(self.views, self.elevation)  # refuses bad values before anything is read
        for key, least in (("size", 8), ("num_points", 1), ("max_faces", 4), ("seed", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"--{key.replace('_', '-')} must be at least {least}, found {value}")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that become a `Recipe`."""
    parser.add_argument("--size", type=int, help=f"side of the pictures; default {MESH_SIZE}, from points {SPLAT_SIZE}")
    parser.add_argument("--views", type=int, default=12, help="cameras around the object")
    parser.add_argument("--elevation", type=float, default=30.0, help="of the cameras, degrees")
    parser.add_argument("--num-points", type=int, default=2048, help="points drawn from each mesh")
    parser.add_argument("--sampling", choices=SAMPLINGS, default="farthest", help="farthest: any beginning is well spread")
    parser.add_argument("--max-faces", type=int, default=500, help="of the simplified mesh")
    parser.add_argument("--seed", type=int, default=0, help="of the surface points")


def modalities_of_cloud(recipe: Recipe, cloud: np.ndarray) -> dict[str, np.ndarray]:
    """Return RGBImg (views, S, S, 3) and GrayImg (views, S, S) uint8, splats of the (n, 3) cloud, z up, and PointCloud, itself.

    Raises:
        MeshError: when it cannot be drawn.
    """
    images = splat_views(normalise(cloud), ring_of_cameras(recipe.views, recipe.elevation), recipe.size)
    return {"RGBImg": images, "GrayImg": luminance(images), "PointCloud": cloud}


def modalities_of_mesh(
    recipe: Recipe, vertices: np.ndarray, triangles: np.ndarray, name: str, cloud: np.ndarray | None = None, parts: Sequence[Part] = ()
) -> tuple[dict[str, np.ndarray], dict]:
    """Make all modalities of a mesh.

    Args:
        vertices, triangles: as from `clean_mesh`, z up; name: of the object: the draw of its points depends on it.
        cloud: (n, 3) to take instead of drawing points; parts: of the same mesh, to be drawn with what they look like.
    Returns:
        As `modalities_of_cloud`, with Mesh (F, 18) float32; and the record of the simplification.
    Raises:
        MeshError: when the mesh cannot be used.
    """
    centre = box_centre(vertices)
    radius = np.linalg.norm(vertices - centre, axis=1).max()
    vertices = normalise(vertices)
    faces, record = simplified_faces(vertices, triangles, recipe.max_faces)
    if cloud is None:
        cloud = sample_surface(vertices, triangles, _drawn(recipe), _seed(recipe, name))
        if recipe.sampling == "farthest":
            cloud = farthest_points(cloud, recipe.num_points, _seed(recipe, name))
        cloud = cloud.astype(np.float32)
    parts = [((corners - centre) / radius, *rest) for corners, *rest in parts] or [(vertices, triangles, None)]
    images = render_views(parts, ring_of_cameras(recipe.views, recipe.elevation), recipe.size)
    return {"RGBImg": images, "GrayImg": luminance(images), "PointCloud": cloud, "Mesh": faces}, record


def thinned(cloud: np.ndarray, recipe: Recipe, name: str) -> np.ndarray:
    """Return at most `recipe.num_points` of the (n, 3) points, drawn as those of a surface are."""
    if len(cloud) <= recipe.num_points:
        return cloud
    chosen = np.random.default_rng(_seed(recipe, name)).permutation(len(cloud))[: _drawn(recipe)]
    return farthest_points(cloud[chosen], recipe.num_points, _seed(recipe, name))


def _drawn(recipe: Recipe) -> int:
    return recipe.num_points * (CANDIDATES if recipe.sampling == "farthest" else 1)


def _seed(recipe: Recipe, name: str) -> tuple[int, int]:
    return recipe.seed, zlib.crc32(name.encode())
