"""Finds the files that a 3D model names: materials, pictures, buffers. Called by `datasets.prepare.readers.objects`."""

import re
from collections.abc import Iterator
from contextlib import suppress
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
            with suppress(OSError, ValueError):
                wanted = self.absolute(meant)
                (found,) = (path for path in wanted.parent.iterdir() if path.name.lower() == wanted.name.lower())
                return found.read_bytes()
        return super().get(name)


def _meanings(name: str) -> Iterator[str]:
    """Yield a name as it is; as a URI of GLTF; without options of MTL files and with slashes for backslashes; and without its folder."""
    plain = OPTIONS.sub("", name.strip(), count=1).replace("\\", "/")
    yield from (name, unquote(name), plain, plain.rpartition("/")[2])
