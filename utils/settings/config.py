"""Loads a YAML file and `--set` overrides into the dataclasses of `utils.settings.options`, refusing whatever does not fit."""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from utils.errors import UserError
from utils.settings.options import nearest

T = TypeVar("T")
_LIMITS = {
    "min": (lambda value, limit: value >= limit, "at least"),
    "max": (lambda value, limit: value <= limit, "at most"),
    "above": (lambda value, limit: value > limit, "above"),
    "below": (lambda value, limit: value < limit, "below"),
}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML silently keeps the last of two equal keys; a configuration must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Sources:
    """Tells where a dotted key came from, for error messages: the file, or one --set argument."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.overrides: dict[str, str] = {}

    def of(self, key: str) -> str:
        """Name the last override that touches `key`, a part of it or a section around it, else the file."""
        nested = lambda inner, outer: f"{inner}.".startswith(f"{outer}.")
        touching = [text for name, text in self.overrides.items() if nested(key, name) or nested(name, key)]
        return f"--set {touching[-1]}" if touching else str(self.path or "defaults")


def _read_yaml(path: str) -> dict:
    if not Path(path).is_file():
        raise UserError(f"no configuration file {path}: give an existing YAML file, see the folder configs/")
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections (data:, model:, ...), found a {type(tree).__name__}")
    return tree


def _apply_override(tree: dict, text: str, sources: _Sources) -> None:
    """Put one KEY=VALUE into the tree; VALUE is YAML, KEY is dotted and may reach into a dictionary setting."""
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")):
        raise UserError(f"--set expects section.key=value, got {text!r}")
    try:
        parsed = yaml.load(value, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):  # absent, or replaced by a wrong value that the check will name
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = parsed
    sources.overrides.pop(key, None)
    sources.overrides[key] = text


def _fail(key: str, sources: _Sources, problem: str, doc: str = "") -> typing.NoReturn:
    raise UserError(f"{sources.of(key)}: {key}: {problem}" + (f" ({doc})" if doc else ""))


def _describe(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint).replace("typing.", "")


def _scalar(hint: Any, value: Any) -> tuple[bool, Any]:
    """Return (fits, converted value) for bool, int, float and str."""
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 (no dot) as text
        try:
            value = float(value)
        except ValueError:
            return False, value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return math.isfinite(value), float(value)
    return type(value) is hint, value


def _convert(hint: Any, value: Any, key: str, sources: _Sources) -> Any:
    """Convert a YAML value to the declared type, or raise with the dotted key."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key, sources)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(entry for entry in arguments if entry is not type(None)), value, key, sources)
    if origin is Literal:
        if value not in arguments:
            _fail(key, sources, f"expected one of {', '.join(map(str, arguments))}, got {value!r}{nearest(value, arguments)}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            _fail(key, sources, f"expected {len(kinds)} values, got {len(value)}: {value!r}")
        return tuple(_convert(kind, entry, f"{key}.{place}", sources) for place, (kind, entry) in enumerate(zip(kinds, value)))
    if origin is dict and isinstance(value, dict):
        return {
            _convert(arguments[0], name, key, sources): _convert(arguments[1], entry, f"{key}.{name}", sources)
            for name, entry in value.items()
        }
    fits, converted = _scalar(hint, value) if origin is None else (False, value)
    if not fits:
        _fail(key, sources, f"expected {_describe(hint)}, got {value!r} of type {type(value).__name__}")
    return converted


def _check_limits(value: Any, metadata: Mapping[str, Any], key: str, sources: _Sources) -> None:
    if isinstance(value, (tuple, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            _check_limits(entry, metadata, key, sources)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        for name, (holds, words) in _LIMITS.items():
            if name in metadata and not holds(value, metadata[name]):
                _fail(key, sources, f"must be {words} {metadata[name]:g}, got {value:g}", metadata.get("doc", ""))


def _build(cls: type[T], tree: Any, prefix: str, sources: _Sources) -> T:
    """Fill one dataclass from one mapping; fields that are absent keep their defaults."""
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        _fail(prefix, sources, f"expected a section with the keys {', '.join(typing.get_type_hints(cls))}, got {tree!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in fields:
            _fail(key, sources, f"unknown key{nearest(name, fields) or ', valid here: ' + ', '.join(fields)}")
        values[name] = _convert(hints[name], value, key, sources)
        _check_limits(values[name], fields[name].metadata, key, sources)
    try:
        return cls(**values)
    except ValueError as error:  # the dataclass's own checks name their keys
        given = " ".join(f"--set {text}" for text in sources.overrides.values())
        raise UserError(f"{' with '.join(filter(None, [sources.path, given])) or 'defaults'}: {error}") from error


def load_config(cls: type[T], path: str | None, overrides: Sequence[str] = ()) -> T:
    """Load a configuration: dataclass defaults, then the YAML file, then the overrides in order.

    Args:
        cls: root dataclass, e.g. utils.settings.options.Step1Config.
        path: YAML file, or None for the defaults.
        overrides: "section.key=value" texts; values are YAML, e.g. "data.modalities=[GrayImg,PointCloud]".
    Returns:
        A frozen, fully checked instance of `cls`.
    Raises:
        UserError: if the file is missing.
        UserError: on invalid YAML, an unknown key (with the nearest valid one), a wrong type, a value out of
            range, or settings that contradict each other; names the file or the --set argument and the key.
    """
    sources = _Sources(None if path is None else str(path))
    tree = {} if path is None else copy.deepcopy(_read_yaml(str(path)))
    for text in overrides:
        _apply_override(tree, text, sources)
    return _build(cls, tree, "", sources)


def to_dict(config: Any) -> dict:
    """Return nested plain dictionaries and lists, ready for YAML and JSON; `load_config` reads them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: Any) -> str:
    """Return 16 hexadecimal digits that depend on every setting."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config, --set and --resume, common to the training scripts."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override settings, e.g. --set optim.epochs=5 data.modalities=[GrayImg,PointCloud]; may be repeated",
    )
    parser.add_argument("--resume", metavar="RUN", help="run folder to continue, with the settings it was started with")
