"""What of GLB and GLTF files trimesh 5.2 passes over without a word. Called by `datasets.prepare.readers.objects`."""

import json
from contextlib import suppress
from typing import Any

UNREAD = {"KHR_draco_mesh_compression", "EXT_meshopt_compression", "EXT_mesh_gpu_instancing"}  # extensions that trimesh passes over
READ = ("KHR_materials", "KHR_texture", "EXT_texture", "KHR_lights", "KHR_mesh_quantization")  # those that files may require
TRIANGLE_FAN = 6  # a mode of GLTF


def passed_over(data: bytes) -> list[str]:
    """Return what of a GLB or GLTF file trimesh would pass over without a word; nothing of a damaged one, where it says so."""
    found = []
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        content = _gltf(data)
        needed = [name for name in content.get("extensionsRequired", ()) if not name.startswith(READ)]
        found += sorted({*needed, *UNREAD.intersection(content.get("extensionsUsed", ()))})
        drawn, nodes = [entry for mesh in content["meshes"] for entry in mesh["primitives"]], content.get("nodes", [])
        found += ["geometry of or below a camera"] * any("camera" in node and {"children", "mesh"} & node.keys() for node in nodes)
        found += ["meshes that no scene shows"] * (not any(scene.get("nodes") for scene in content.get("scenes", ())))
        found += ["a skin"] * any("skin" in node for node in nodes)
        found += ["a morph target with a weight"] * any(any(made.get("weights", ())) for made in (*nodes, *content["meshes"]))
        found += ["a triangle fan"] * any(entry.get("mode") == TRIANGLE_FAN for entry in drawn)
        places = [content["accessors"][entry["attributes"]["POSITION"]] for entry in drawn]
        corners = [content["accessors"][entry["indices"]] for entry in drawn if "indices" in entry]
        found += ["normalised integer positions"] * any(entry.get("normalized") for entry in places)
        found += ["a sparse accessor"] * any("sparse" in entry for entry in places + corners)
    return found


def moves_textures(data: bytes) -> bool:
    """Whether a GLB or GLTF file moves a texture, or has further coordinates for it, which trimesh passes over."""
    moves = lambda made: bool(
        made.get("texCoord") or made.get("rotation") or any(made.get("offset", ())) or any(side != 1 for side in made.get("scale", ()))
    )
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        used = [material.get("pbrMetallicRoughness", {}).get("baseColorTexture", {}) for material in _gltf(data)["materials"]]
        return any(moves(entry) or moves(entry.get("extensions", {}).get("KHR_texture_transform", {})) for entry in used)
    return False


def _gltf(data: bytes) -> dict[str, Any]:
    """Return the JSON of a GLB or GLTF file."""
    return json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")] if data[:4] == b"glTF" else data)
