"""Settings of a compared method: those of step 1, whose files it reads, with its own optimiser and options."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from baselines import Entry, method_entry
from baselines.method import NOT_NEGATIVE, Method, ShallowMethod
from utils.errors import UserError
from utils.settings.config import SWITCHES, broken_limit
from utils.settings.data_options import nearest, option
from utils.settings.options import OptimConfig, Step1Config


@dataclass(frozen=True)
class MethodOptimConfig(OptimConfig):
    """Optimisation of a deep method; `training_defaults` of its class are the defaults."""

    optimizer: Literal["adam", "sgd"] = option("adam", "sgd: with momentum 0.9")
    betas: tuple[float, float] = option((0.9, 0.999), "of Adam", min=0, below=1)
    nesterov: bool = option(False, "of sgd")
    clip: float | None = option(None, "largest norm of the gradient; default: any", above=0)


@dataclass(frozen=True)
class MethodConfig:
    """The method, and what it is told of classes."""

    name: str = option("cca", "key of baselines.METHODS")
    options: dict[str, str] = option({}, "the method's own options, see `defaults` of its class")
    num_clusters: int = option(20, "K of pseudo-labels; where labels are read, their number of classes takes its place", min=2)
    features: str | None = option(None, "end to end: folder of baselines.features, for targets; default: what the initial encoders say")
    noise: float = option(0.0, "share of wrong training labels, for methods that read labels", min=0, below=1)
    noise_kind: Literal["symmetric", "asymmetric"] = option("symmetric", "a wrong label is any other class, or the next one")


@dataclass(frozen=True)
class BaselineConfig(Step1Config):
    """Settings of `python -m baselines.run`; the section pla is read and has no effect."""

    optim: MethodOptimConfig = dataclasses.field(default_factory=MethodOptimConfig)
    method: MethodConfig = dataclasses.field(default_factory=MethodConfig)


def method_overrides(name: str, end_to_end: bool) -> list[str]:
    """Return the "section.key=value" texts that give a method its own training; end to end, epochs are the configuration's."""
    cls = method_entry(name).load()
    texts = [f"method.name={name}", "pla.mlm_only_epochs=0", "mlm.self_term=false", "eval.representation=embedding", "run.eval_every=0"]
    if issubclass(cls, ShallowMethod):
        return [*texts, f"model.embedding_dim={cls.dim}", "optim.epochs=1"]
    training = dataclasses.asdict(cls.training_defaults)
    texts.append(f"model.embedding_dim={training.pop('dim')}")
    if end_to_end:
        training.pop("epochs")
    plain = lambda value: "null" if value is None else list(value) if isinstance(value, tuple) else value
    return texts + [f"optim.{key}={plain(value)}" for key, value in training.items()]


def check_optim(entry: Entry, overrides: Sequence[str]) -> None:
    """Raise a UserError if "section.key=value" texts give settings of the learner's optimiser to a method that is fitted without it."""
    given = [text for text in overrides if text.startswith(("optim.", "optim="))]
    if given and issubclass(cls := entry.load(), ShallowMethod):
        own = ", ".join(f"method.options.{name}" for name in cls.defaults) or "none"
        raise UserError(f"--set {given[0]}: {entry.title} is fitted without optim and reads none of it; its own options: {own}")


def method_options(cls: type[Method], given: Mapping[str, str]) -> dict[str, Any]:
    """Return the method's `defaults` with the given texts, each read as the type of its default.

    Raises:
        UserError: on an unknown option, a text of another type, or a number outside the `limits` of the class.
    """
    options = dict(cls.defaults)
    for key, text in given.items():
        if key not in options:
            raise UserError(f"method.options.{key}: unknown{nearest(key, options)} (known: {', '.join(options) or 'none'})")
        kind = type(options[key])
        try:
            options[key] = SWITCHES[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise UserError(f"method.options.{key}: expected {kind.__name__}, got {text!r}") from None
        if kind is float and not math.isfinite(options[key]):
            raise UserError(f"method.options.{key}: expected a finite number, got {text!r}")
        limits = cls.limits.get(key, NOT_NEGATIVE if kind in (int, float) else {})
        if problem := broken_limit(options[key], limits):
            raise UserError(f"method.options.{key}: {problem}" + (f" ({limits['doc']})" if "doc" in limits else ""))
    return options
