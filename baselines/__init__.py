"""What RoMo is compared with: the table of methods. Nothing else in the project imports this package but its own commands."""

import importlib
from dataclasses import dataclass
from statistics import mean
from typing import Literal

import yaml

from utils.engine.run_log import REPOSITORY
from utils.errors import UserError
from utils.settings.data_options import nearest


@dataclass(frozen=True)
class Entry:
    """One method of the comparison.

    Attributes:
        title: as the paper writes it, also its row in the paper's tables; place: module and class below `baselines`.
        kind: "shallow", "deep", "hash" (ranked by its continuous code and by its signs) or "supervised".
        labels: what it learns from beside the samples; end_to_end: has a mode that trains the encoders, too.
        joint: takes more than two modalities at once.
    """

    title: str
    place: str
    kind: Literal["shallow", "deep", "hash", "supervised"]
    labels: Literal["none", "pseudo-labels", "source labels", "noisy labels"] = "none"
    end_to_end: bool = False
    joint: bool = False

    @property
    def reads_truth(self) -> bool:
        """Whether it learns from ground truth, right or with wrong labels in it."""
        return self.labels in ("source labels", "noisy labels")

    def load(self) -> type:
        """Return the method's class."""
        module, name = self.place.split(":")
        return getattr(importlib.import_module(f"baselines.{module}"), name)

    def published(self) -> dict[str, float]:
        """Return data set -> mean mAP over its tasks in the paper's Tables II and III; empty for a row that they lack.

        Of methods that read noisy labels: at 20 % wrong ones, as RONO's authors report it.
        """
        table, row = ("rono_noise", f"{self.title} 0.2") if self.labels == "noisy labels" else ("comparison", self.title)
        tables = yaml.safe_load((REPOSITORY / "experiments" / "paper.yaml").read_text(encoding="utf-8"))[table]
        found = {name: [scores[row] for scores in tasks.values() if row in scores] for name, tasks in tables.items()}
        return {name: mean(scores) for name, scores in found.items() if scores}


METHODS: dict[str, Entry] = {
    "cca": Entry("CCA", "cca:CCA", "shallow"),
    "kcca": Entry("KCCA", "kcca:KCCA", "shallow"),
    "mcca": Entry("MCCA", "mcca:MCCA", "shallow", joint=True),
    "dcca": Entry("DCCA", "dcca:DCCA", "deep"),
    "dccae": Entry("DCCAE", "dccae:DCCAE", "deep"),
    "revgrad": Entry("RevGrad", "revgrad:RevGrad", "deep", "pseudo-labels", end_to_end=True),
    "meda": Entry("MEDA", "meda:MEDA", "shallow", "pseudo-labels"),
    "djsrh": Entry("DJSRH", "djsrh:DJSRH", "hash", end_to_end=True),
    "jdsh": Entry("JDSH", "jdsh:JDSH", "hash", end_to_end=True),
    "dgcpn": Entry("DGCPN", "dgcpn:DGCPN", "hash", end_to_end=True),
    "ucch": Entry("UCCH", "ucch:UCCH", "hash", end_to_end=True),
    "scl": Entry("SCL", "scl:SCL", "deep", end_to_end=True),
    "pt_fuch": Entry("PT-FUCH", "pt_fuch:PTFUCH", "hash", "pseudo-labels"),
    "cfrh": Entry("CFRH", "cfrh:CFRH", "hash"),
    "revgrad_oracle": Entry("RevGrad, true source labels", "revgrad:RevGrad", "deep", "source labels", end_to_end=True),
    "meda_oracle": Entry("MEDA, true source labels", "meda:MEDA", "shallow", "source labels"),
    "rono": Entry("RONO", "rono:RONO", "supervised", "noisy labels", end_to_end=True),
    "mrl": Entry("MRL", "mrl:MRL", "supervised", "noisy labels", end_to_end=True),
}


def method_entry(name: str) -> Entry:
    """Return a method's entry; a UserError names the nearest one to an unknown name."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)} (known: {', '.join(METHODS)})")
    return METHODS[name]
