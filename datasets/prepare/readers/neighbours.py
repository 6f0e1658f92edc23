"""Finds the files that a 3D model names: materials, pictures, buffers. Called by `datasets.prepare.readers.objects`."""

import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from trimesh.resolvers import FilePathResolver

# Of MTL files, before the name of a picture: switches, options of a word or two, and offset, size and turbulence of one to three numbers
OPTIONS = re.compile(r"(-(blendu|blendv|cc|clamp|imfchan|texres|boost|bm|type)\s+\S+\s+|-mm\s+\S+\s+\S+\s+|-[ost](\s+[-+.\de]+){1,3}\s+)*")


class Neighbours(FilePathResolver):
    """trimesh's, which also finds names as they are written on other systems and by other programs."""

    def get(self, name: str) -> bytes:
        """Return the content of the first file that a name can mean; an OSError or ValueError if none is there."""
        for meant in _meanings(name):
            with suppress(OSError, ValueError):
                return super().get(meant)
        for meant in _meanings(name):
            with suppress(OSError, ValueError, LookupError):
                place = Path(self.parent)
                for part in Path(meant).parts:
                    place = place / (part if part == ".." else _entries(place)[part.lower()])
                return self.absolute(str(place)).read_bytes()
        return super().get(name)


def _meanings(name: str) -> tuple[str, ...]:
    """Return a name as it is; as a URI of GLTF; without options of MTL files and with slashes for backslashes; and without its folder."""
    plain = OPTIONS.sub("", name.strip(), count=1).replace("\\", "/")
    return tuple(dict.fromkeys((name, unquote(name), plain, plain.rpartition("/")[2])))


@lru_cache(maxsize=4)
def _entries(folder: Path) -> dict[str, str]:
    """Return lower-case name -> name of what lies in a folder."""
    return {path.name.lower(): path.name for path in folder.iterdir()}
