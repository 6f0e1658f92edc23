"""The variants of the fidelity study: our protocol, one departure of the authors' code each, and all of them."""

VARIANTS = {
    "ours": "our protocol: no departure, score of the last epoch",
    "oracle_labels": "pseudo-labels copied from the ground truth at the position of the farthest sample of the other modality",
    "class_pairs": "training rows join different instances, mostly of one class, in the shares of the published lists",
    "batch_clip": "RCLL clips at 1 / batch size instead of 1 / K, and repeats rows",
    "shuffled_memory": "the memory banks are filled in shuffled order but read and updated by sample number",
    "test_selection": "the epoch of step 2 is chosen by its score on the test set",
    "all": "all five departures together",
}


def departures_of(variant: str) -> frozenset[str]:
    """Return the names of the departures that a variant, a key of `VARIANTS`, follows; our protocol follows none."""
    single = frozenset(VARIANTS) - {"ours", "all"}
    return single if variant == "all" else single & {variant}
