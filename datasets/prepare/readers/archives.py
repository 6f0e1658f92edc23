"""Zip archives as they come from the internet: what is wrong with one or a member of it, and what to do about it."""

import lzma
import re
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

from datasets.prepare.shapes.mesh import MeshError
from utils.errors import UserError

# What reading an archive raises; RuntimeError: encrypted, NotImplementedError: an unknown method, the others: damage.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, ValueError, OverflowError)
READ_ERRORS = (*DAMAGE, RuntimeError, NotImplementedError)
METHODS = {1: "Shrink", 6: "Implode", 9: "Deflate64", 93: "Zstandard", 95: "XZ", 97: "WavPack", 98: "PPMd", 99: "AES encryption"}
READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
ENCRYPTED = 0x1  # flag bit
REPACK = "unpack it with the program that made it (or 7z x) and pack the folder again as a plain zip file (zip -r)"


def list_members(path: str | Path, pattern: re.Pattern) -> list[zipfile.ZipInfo]:
    """Return the members whose names match, sorted by name; those in a __MACOSX folder never do.

    Raises:
        UserError: when the archive is missing, damaged, a part of a split one, or a matching member cannot be read by Python.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} not found: expected a zip file such as ModelNet10.zip of the Princeton ModelNet project")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
        if any(entry.volume for entry in entries):
            raise zipfile.BadZipFile("it is the last part of several")
    except READ_ERRORS as error:
        raise UserError(
            f"{path} is not a complete zip file ({error}); fetch it again, or, if it came in parts, join them first "
            "(zip -s 0 PART.zip --out WHOLE.zip)"
        ) from error
    found = [entry for entry in entries if "__MACOSX" not in entry.filename and pattern.fullmatch(entry.filename)]
    for entry in found:
        if entry.flag_bits & ENCRYPTED or entry.compress_type not in READABLE:
            method = "encryption" if entry.flag_bits & ENCRYPTED else METHODS.get(entry.compress_type, "an unknown method")
            reason = f"packed with {method} ({entry.compress_type}), which Python cannot read"
            raise UserError(f"{path}, member {entry.filename}: {reason}; {REPACK}")
    return found


def read_member(path: str | Path, name: str) -> bytes:
    """Return the content of one member; a MeshError says that it is damaged, a UserError that the whole archive cannot be read."""
    try:
        return _open(str(path)).read(name)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(problem(path, name, error)) from error
    except (*DAMAGE, KeyError) as error:
        raise MeshError(problem(path, name, error)) from error


def problem(path: str | Path, member: str, error: Exception) -> str:
    """Return a message on a member that cannot be read: archive, member, reason, remedy."""
    packed = isinstance(error, RuntimeError)  # NotImplementedError is one
    found, remedy = ("cannot be read", REPACK) if packed else ("damaged or missing", "fetch the archive again")
    return f"{path}, member {member}: {found} ({error}); {remedy}"


@lru_cache(maxsize=1)
def _open(archive: str) -> zipfile.ZipFile:
    """Open an archive once per process: its table of contents takes longer to read than a mesh."""
    return zipfile.ZipFile(archive)
