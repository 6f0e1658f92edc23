"""Loads a YAML file and `--set` overrides into the dataclasses of `utils.settings.options`, refusing whatever does not fit."""

import dataclasses
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar, Union

from utils.errors import UserError
from utils.settings.data_options import nearest
from utils.settings.files import Plain, Sources, apply_override, is_null, read_files

T = TypeVar("T")
_LIMITS = {
    "min": (lambda value, limit: value >= limit, "at least"),
    "max": (lambda value, limit: value <= limit, "at most"),
    "above": (lambda value, limit: value > limit, "above"),
    "below": (lambda value, limit: value < limit, "below"),
}
SET = {"dest": "overrides", "nargs": "+", "action": "extend", "default": [], "metavar": "KEY=VALUE"}  # of a command's --set
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _fail(key: str, sources: Sources, problem: str, doc: str = "") -> typing.NoReturn:
    raise UserError(f"{sources.of(key)}: {key}: {problem}" + (f" ({doc})" if doc else ""))


def _describe(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint).replace("typing.", "")


def _scalar(hint: type, value: Any) -> Any:
    """Return what was typed as a bool, int, float or str; ValueError or KeyError if it is none."""
    if hint is str and isinstance(value, str) and (value == "~" or not is_null(value)):
        return str(value)
    if hint is bool and isinstance(value, Plain):
        return SWITCHES[value.lower()]
    if hint in (int, float) and isinstance(value, Plain) and math.isfinite(number := hint(value)):
        return number
    raise ValueError(value)


def _convert(hint: Any, value: Any, key: str, sources: Sources) -> Any:
    """Convert a YAML value to the declared type, or raise with the dotted key."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if is_null(value):
            return None
        words = [word for entry in arguments if typing.get_origin(entry) is Literal for word in typing.get_args(entry)]
        if value in words:
            return str(value)
        return _convert(next(entry for entry in arguments if entry is not type(None)), value, key, sources)
    if origin is Literal:
        chosen = [entry for entry in arguments if value == str(entry)]
        return chosen[0] if chosen else _fail(
            key, sources, f"expected one of {', '.join(map(str, arguments))}, got {value!r}{nearest(value, arguments)}"
        )
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
    with suppress(ValueError, KeyError, OverflowError):
        if origin is None:
            return _scalar(hint, value)
    _fail(key, sources, f"expected {_describe(hint)}, got {value!r}" + (", that is nothing" if is_null(value) else ""))


def _expand(value: Any, key: str, sources: Sources) -> Any:
    """Return a path, or the paths of a dictionary, with a leading ~ replaced by the home folder."""
    if isinstance(value, dict):
        return {name: _expand(entry, f"{key}.{name}", sources) for name, entry in value.items()}
    path = os.path.expanduser(value)
    if path.startswith("~"):
        _fail(key, sources, f"there is no home folder {value!r}: write the path in full, or ./{value} for a file of that name")
    if os.path.expandvars(path) != path:
        _fail(key, sources, f"{value!r}: variables are not replaced here: write the path in full, or begin it with ~")
    return path


def _check_limits(value: Any, metadata: Mapping[str, Any], key: str, sources: Sources) -> None:
    if isinstance(value, (tuple, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            _check_limits(entry, metadata, key, sources)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and (problem := broken_limit(value, metadata)):
        _fail(key, sources, problem, metadata.get("doc", ""))


def broken_limit(value: float, limits: Mapping[str, Any]) -> str:
    """Return "must be at least 1, got 0" or the like of a number outside `min`, `max`, `above` or `below`; of others nothing."""
    broken = [f"{words} {limits[name]:g}" for name, (holds, words) in _LIMITS.items() if name in limits and not holds(value, limits[name])]
    return f"must be {broken[0]}, got {value:g}" if broken else ""


def _build(cls: type[T], tree: Any, prefix: str, sources: Sources, default: T | None = None) -> T:
    """Fill one dataclass from one mapping; fields that are absent keep their defaults, those of `default` if it is given."""
    tree = {} if is_null(tree) else tree
    hints = typing.get_type_hints(cls)
    if not isinstance(tree, dict):
        _fail(prefix, sources, f"expected a section with the keys {', '.join(hints)}, got {tree!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in fields:
            _fail(key, sources, _unknown(name, fields, prefix))
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, key, sources, fields[name].default_factory())
            continue
        values[name] = _convert(hints[name], value, key, sources)
        _check_limits(values[name], fields[name].metadata, key, sources)
        if fields[name].metadata.get("path") and values[name] is not None:
            values[name] = _expand(values[name], key, sources)
    try:
        return cls(**values) if default is None else dataclasses.replace(default, **values)
    except ValueError as error:  # the dataclass's own checks name their keys
        raise UserError(f"{sources.all()}: {error}") from error


def _unknown(name: str, fields: Mapping[str, dataclasses.Field], section: str) -> str:
    """Say what is wrong with a key, and what to write instead."""
    renamed = [field.name for field in fields.values() if field.metadata.get("formerly") == name]
    if renamed:
        return f"this setting is now called {section}.{renamed[0]}"
    return f"unknown key{nearest(name, fields) or ', valid here: ' + ', '.join(fields)}"


def load_config(cls: type[T], path: str | None, overrides: Sequence[str] = ()) -> T:
    """Load a configuration: dataclass defaults, then the YAML file and those it extends, then the overrides in order.

    The declared type decides what a scalar means, not YAML's guess: `off` is a word where text is expected and a switch where
    a bool is. A leading ~ in settings that hold paths is the home folder; variables such as $HOME are refused.

    Args:
        cls: root dataclass, of `utils.settings.options`.
        path: YAML file, see `utils.settings.files.read_files`, or None for the defaults.
        overrides: "section.key=value" texts, e.g. "data.modalities=[GrayImg,PointCloud]".
    Raises:
        UserError: on a missing file, invalid YAML, an unknown key (with the nearest valid one), a wrong type, a value out of
            range, or settings that contradict each other; names the file or the --set argument and the key.
    """
    sources = Sources()
    tree = {} if path is None else read_files(str(path), sources)
    for text in overrides:
        apply_override(tree, text, sources)
    return _build(cls, tree, "", sources)


def to_dict(config: Any) -> dict:
    """Return nested plain dictionaries and lists, ready for YAML and JSON; `load_config` reads them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: Any) -> str:
    """Return 16 hexadecimal digits that depend on every setting."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]
