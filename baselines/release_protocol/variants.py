"""The variants of the fidelity study: our protocol, one departure of the authors' code each, and all of them."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Departures:
    """Which departures of the authors' code a run follows; all are off in our protocol.

    Attributes:
        oracle_labels: pseudo-labels are ground truth, see `labels.farthest_labels`.
        class_pairs: training rows are paired across modalities as in the published lists, see `pairs.pair_by_class`.
        batch_clip: RCLL's threshold is 1 / batch size, see `loss.BatchClippedLoss`.
        shuffled_memory: the memory banks start out of order, see `learners.ReleasePLA.cluster`.
        test_selection: the epoch of step 2 with the best test score is the result, not the last one.
    """

    oracle_labels: bool = False
    class_pairs: bool = False
    batch_clip: bool = False
    shuffled_memory: bool = False
    test_selection: bool = False

    @property
    def reads_labels(self) -> bool:
        """Whether training reads the labels of the training set."""
        return self.oracle_labels or self.class_pairs


VARIANTS = {
    "ours": "our protocol: no departure, score of the last epoch",
    "oracle_labels": "pseudo-labels copied from the ground truth at the position of the farthest sample of the other modality",
    "class_pairs": "training rows join different instances, mostly of one class, in the shares of the published lists",
    "batch_clip": "RCLL clips at 1 / batch size instead of 1 / K, and repeats rows",
    "shuffled_memory": "the memory banks are filled in shuffled order but read and updated by sample number",
    "test_selection": "the epoch of step 2 is chosen by its score on the test set",
    "all": "all five departures together",
}


def departures_of(variant: str) -> Departures:
    """Return the departures of a variant, a key of `VARIANTS`."""
    return Departures(**{field.name: variant in (field.name, "all") for field in fields(Departures)})
