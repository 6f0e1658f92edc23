"""Reads configuration files and `--set` texts into one tree of what was typed. `utils.settings.config` gives it types."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError


class Plain(str):
    """A YAML scalar without quotes. The declared type of its setting says what it means, so `off` can be a word."""


class _TextLoader(yaml.SafeLoader):
    """Keeps every scalar as it was typed, and refuses equal keys, of which YAML silently keeps the last."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # merge keys; no guessing of types

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_TextLoader.add_constructor("tag:yaml.org,2002:str", lambda _, node: node.value if node.style else Plain(node.value))


class Sources:
    """Tells where a dotted key came from, for error messages: one of the files, or one --set argument."""

    def __init__(self) -> None:
        self.files: list[str] = []  # the given one first, then those that it extends
        self.overrides: list[str] = []
        self._keys: dict[str, str] = {}  # in the order of their effect

    def add(self, key: str, source: str) -> None:
        self._keys.pop(key, None)
        self._keys[key] = source

    def of(self, key: str) -> str:
        """Name the last source that touches `key`, a part of it or a section around it."""
        nested = lambda inner, outer: f"{inner}.".startswith(f"{outer}.")
        touching = [source for name, source in self._keys.items() if nested(key, name) or nested(name, key)]
        return touching[-1] if touching else self.all()

    def all(self) -> str:
        """Name everything that was read; for settings that contradict each other."""
        file = " extending ".join(filter(None, [*self.files[:1], ", ".join(self.files[1:])]))
        return " with ".join(filter(None, [file, " ".join(f"--set {text}" for text in self.overrides)])) or "defaults"


def is_null(value: Any) -> bool:
    """Whether a value is YAML's way of saying nothing."""
    return value is None or (isinstance(value, Plain) and value.lower() in ("", "~", "null"))


def read_files(path: str, sources: Sources, users: tuple[Path, ...] = ()) -> dict:
    """Read a configuration file on top of all that its key `extends` names: a file, or a list of files of which later ones win.

    Sections are merged key by key, anything else is replaced.

    Args:
        path: the file; a relative path after `extends` starts in the folder of the file that holds it.
        sources: told where every value came from.
        users: the files by way of which this one was reached.
    Raises:
        UserError: if a file is missing, no YAML, no tree of sections, gives a key twice or extends itself; names the file.
    """
    here = Path(os.path.expanduser(path))
    if here.resolve() in users:
        raise UserError(f"{path} extends itself by way of {' and '.join(map(str, users[users.index(here.resolve()) :]))}")
    own = _read_yaml(here, users)
    path = os.path.normpath(path)
    sources.files.append(path)
    tree: dict = {}
    for base in _extended(own, path):
        tree = _merge(tree, read_files(str(here.parent / os.path.expanduser(base)), sources, (*users, here.resolve())))
    for key in flatten(own):
        sources.add(key, path)
    return _merge(tree, own)


def _read_yaml(path: Path, users: tuple[Path, ...]) -> dict:
    if not path.is_file():
        named = f", which {users[-1]} extends" if users else ""
        raise UserError(f"no configuration file {path}{named}: give an existing YAML file, see the folder configs/")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_TextLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if is_null(tree):
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections (data:, model:, ...), found a {type(tree).__name__}")
    return tree


def _extended(tree: dict, path: str) -> list[str]:
    """Take the key `extends` out of a tree."""
    given = tree.pop("extends", [])
    files = given if isinstance(given, list) else [given]
    for file in files:
        if not isinstance(file, str) or not file or is_null(file):
            raise UserError(f"{path}: extends: expected a file or a list of files, got {given!r}")
    return files


def _merge(below: Mapping, above: Mapping) -> dict:
    """Return new dictionaries: `above` laid over `below`; an empty section leaves what is below it."""
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        if isinstance(value, dict):
            merged[key] = _merge(under if isinstance(under, dict) else {}, value)
        elif not (is_null(value) and isinstance(under, dict)):
            merged[key] = value
    return merged


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Dotted keys -> leaves; an empty dictionary is a leaf, so that it differs from an absent one."""
    flat = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat.update(flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value})
    return flat


def apply_override(tree: dict, text: str, sources: Sources) -> None:
    """Put one KEY=VALUE into the tree. KEY is dotted and may reach into a dictionary setting; VALUE is taken as it stands, or
    read as YAML if it begins with a bracket, a brace or a quotation mark."""
    key, separator, value = (part.strip() for part in text.partition("="))
    if not separator or not all(key.split(".")):
        raise UserError(f"--set expects section.key=value, got {text!r}")
    try:
        parsed = yaml.load(value, Loader=_TextLoader) if value[:1] in tuple("[{'\"") else Plain(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):  # absent, or replaced by a wrong value that the check will name
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = parsed
    sources.overrides = [given for given in sources.overrides if given.partition("=")[0].strip() != key] + [text]
    sources.add(key, f"--set {text}")
