"""What the surface of a mesh looks like, from trimesh's reading of a file to VTK's drawing of it. Used in preparation."""

from typing import Any

import numpy as np

# Colours (T, 3) uint8 of the triangles; or coordinates (V, 2) of the vertices in a picture (H, W, 3) uint8; or None, neutral
Look = np.ndarray | tuple[np.ndarray, np.ndarray] | None
MOST_REPEATS = 50  # of a texture; larger coordinates that are all whole numbers are quantised ones, which trimesh does not scale
Part = tuple[np.ndarray, np.ndarray, Look]  # vertices (V, 3), triangles (T, 3)


def look_of(mesh: Any) -> Look:
    """Return the look of a trimesh.Trimesh: its texture, else the colours given to its material, faces or vertices, else None.

    The colour of a material of glTF multiplies its texture. Quantised texture coordinates give None, and so does the gray picture
    that trimesh invents where a file names none.
    """
    from trimesh.visual.material import color_image

    visual = mesh.visual
    if visual.kind != "texture":
        return np.asarray(visual.face_colors)[:, :3] if visual.kind else None
    material = visual.material
    picture = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    colour, unset = (np.asarray(made.main_color)[:3] for made in (material, type(material)()))
    is_set = not np.array_equal(colour, unset)
    if picture is not None and visual.uv is not None and not np.array_equal(np.asarray(picture), np.asarray(color_image())):
        if np.abs(visual.uv).max(initial=0) > MOST_REPEATS and (visual.uv % 1 == 0).all():
            return None
        pixels = np.asarray(picture.convert("RGB"))
        if is_set and hasattr(material, "baseColorFactor"):
            pixels = (pixels * (colour / 255)).round().astype(np.uint8)
        return np.asarray(visual.uv, dtype=np.float32), pixels
    return np.tile(colour, (len(mesh.faces), 1)) if is_set else None


def keep_vertex_colours(mesh: Any) -> None:
    """Make the vertex colours of a part of glTF, times the colour of its material, its look, unless that has a texture.

    trimesh keeps them beside the material and loses them when it moves the part to its place.
    """
    from trimesh.visual.color import ColorVisuals, to_rgba

    colours = getattr(mesh.visual, "vertex_attributes", {}).get("color")
    if colours is not None and getattr(mesh.visual.material, "baseColorTexture", None) is None:
        factor = mesh.visual.material.baseColorFactor
        shades = to_rgba(colours) * (1 if factor is None else to_rgba(factor) / 255)
        mesh.visual = ColorVisuals(mesh, vertex_colors=shades.round().astype(np.uint8))


def put_on(surface: Any, look: Look) -> dict[str, Any]:
    """Give a pyvista.PolyData its look; return the arguments of `add_mesh` that show it, none for None."""
    if look is None:
        return {}
    if isinstance(look, tuple):
        import pyvista
        surface.active_texture_coordinates = look[0]
        return {"texture": pyvista.Texture(look[1]), "color": "white"}
    surface.cell_data["colours"] = look
    return {"scalars": "colours", "rgb": True}
