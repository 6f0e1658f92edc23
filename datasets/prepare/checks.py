"""The checks of `datasets.inspect`: each reports all it finds and none stops another. Training never imports this module."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets.kinds import KINDS
from datasets.lists import SampleList, check_disjoint, check_paired, default_list_path, read_labelled_list, read_training_list
from datasets.prepare.ownership import MANIFEST, SPLITS, pairs_path, read_manifest
from datasets.pseudo_labels import file_hash
from datasets.samples import list_options, list_path
from utils.errors import MissingFileError, MissingLabelsError, UserError
from utils.modalities import MODALITIES
from utils.settings.options import DataConfig

REMAKE = "or remove it and prepare the data again: a list that is there stays as it is"
REPAIR = "; prepare the data again, or take the object out of the lists of every modality"
PAIRING_NOTES = {
    "instance": "row k of every list shows one object",
    "class": "data.pairing: class: row k of the training lists shows one class; such pairs are made with labels, so training on "
    "them is not unsupervised. Test lists are not paired",
    "none": "data.pairing: none: no row is a pair of anything; there is nothing to compare",
}


@dataclass
class Check:
    """Outcome of one check: what should hold, findings, notes although nothing failed, and whether there was anything to look at."""

    name: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: bool = True

    def attempt(self, action: Callable, *arguments: Any, advice: str = "") -> Any:
        """Return action(*arguments); if it refuses the data, keep its message and the advice as a problem and return None."""
        try:
            return action(*arguments)
        except (UserError, OSError) as error:
            self.problems.append(f"{error}{advice}")

    def lines(self) -> list[str]:
        """Return the outcome as lines of text, the first with the name and `ok`, `FAILED: ...` or `not run`."""
        states = [f"FAILED: {problem}" for problem in self.problems] or ["ok" if self.done else "not run"]
        first, *others = [*states, *(f"({note})" for note in self.notes)]
        return [f"{self.name:<40}{first}", *(" " * 40 + text for text in others)]


@dataclass(frozen=True)
class Listed:
    """One list file that could be read: its samples, and their labels (N,) int64, or None if it carries none."""

    samples: SampleList
    labels: np.ndarray | None


Lists = dict[tuple[str, str], Listed]  # (split, modality) -> list


def prepared_modalities(data: DataConfig) -> list[str]:
    """Return `data.modalities`, then all others of which a list file exists."""
    others = [name for name in MODALITIES if name not in data.modalities]
    return [*data.modalities, *(name for name in others if any(list_path(data, name, split).is_file() for split in SPLITS))]


def read_lists(data: DataConfig) -> tuple[Lists, list[Check]]:
    """Read every list of every prepared modality; only those of `data.modalities` must exist.

    Returns:
        The lists that could be read, and the checks `list files exist and parse` and `listed files exist`.
    """
    lists, parsed, found, bare = {}, Check("list files exist and parse"), Check("listed files exist"), []
    for split in SPLITS:
        for name in prepared_modalities(data):
            path = list_path(data, name, split)
            optional = name not in data.modalities or split == "test" and name not in data.test_lists
            if optional and not path.is_file():
                bare += [path] * (name in data.modalities)
                continue
            options = list_options(data, name, split)
            try:
                lists[split, name] = Listed(*read_labelled_list(**options))
            except MissingLabelsError:
                lists[split, name] = Listed(read_training_list(**options), None)
                bare += [path] * (split == "test")
            except (UserError, OSError) as error:
                of_sample = isinstance(error, MissingFileError) and path.is_file()
                (found if of_sample else parsed).problems.append(f"{error}{REPAIR}" if of_sample else str(error))
    if any(listed.labels is not None for (split, _), listed in lists.items() if split == "test"):
        wanted = "expected rows `path label` as in the other test lists: evaluation needs labels; add the class to every row"
        parsed.problems += [f"{path}: {wanted}" for path in bare]
    elif bare:
        parsed.notes.append("no test list with labels: training runs, evaluation is skipped")
    found.done = bool(lists or found.problems)
    return lists, [parsed, found]


def run_checks(data: DataConfig, lists: Lists) -> Iterator[Check]:
    """Run all checks of the lists that could be read, one at a time: pairs, labels, splits, files, manifest."""
    unread = [f"{split} {name}" for split in SPLITS for name in prepared_modalities(data) if (split, name) not in lists]
    for name, action in {
        "rows are paired": _check_pairs, "labels agree between modalities": _check_labels,
        "training and test are disjoint": _check_splits, "every file loads": _check_files,
        "lists are as long as the manifest says": _check_manifest,
    }.items():
        check = Check(name, done=bool(lists))
        action(data, lists, check)
        if unread:
            check.notes.append(f"without {', '.join(unread)}: no readable list")
        yield check


def _paired(data: DataConfig, lists: Lists) -> Iterator[tuple[str, list[Listed]]]:
    """Yield every split whose rows belong together, with its lists."""
    for split in {"instance": SPLITS, "class": ("train",), "none": ()}[data.pairing]:
        yield split, [listed for (part, _), listed in lists.items() if part == split]


def _check_pairs(data: DataConfig, lists: Lists, check: Check) -> None:
    check.notes.append(PAIRING_NOTES[data.pairing])
    for _, listed in _paired(data, lists):
        for other in listed[1:]:
            check.attempt(check_paired, [listed[0].samples, other.samples], data.pairing == "instance")


def _check_labels(data: DataConfig, lists: Lists, check: Check) -> None:
    """Objects (with class pairs: rows) have one label in all modalities."""
    keys = lambda listed: listed.samples.instance_ids if data.pairing == "instance" else range(len(listed.samples))
    for split, listed in _paired(data, lists):
        first, *others = [one for one in listed if one.labels is not None] or [None]
        if not others:
            check.notes.append(f"{split}: fewer than two lists with labels, nothing to compare")
        for other in others:
            rows = {key: row for row, key in enumerate(keys(first))}
            common = [(rows[key], row) for row, key in enumerate(keys(other)) if key in rows]
            different = [(mine, row) for mine, row in common if first.labels[mine] != other.labels[row]]
            for mine, row in different[:1]:
                check.problems.append(
                    f"{len(different)} labels differ, the first: {first.labels[mine]} in {first.samples.path}, row {mine + 1}, but "
                    f"{other.labels[row]} in {other.samples.path}, row {row + 1}; correct the wrong list, {REMAKE}"
                )


def _check_splits(data: DataConfig, lists: Lists, check: Check) -> None:
    for name in prepared_modalities(data):
        if ("train", name) in lists and ("test", name) in lists:
            train, test = (lists[split, name].samples for split in SPLITS)
            check.attempt(check_disjoint, train, test)
            copies = _copies(train.files, test.files)
            for mine, other in copies[:1]:
                many = f"{len(copies)} test files of {name} have the content of a training file"
                check.notes.append(f"warning: {many}, the first: {other} and {mine}")


def _copies(train: Sequence[str], test: Sequence[str]) -> list[tuple[str, str]]:
    """Return (training file, test file) of equal content, for test files that are not themselves in the training list."""
    same_file, same_content = set(map(os.path.realpath, train)), {file_hash(file): file for file in train}
    fresh = [(file_hash(file), file) for file in test if os.path.realpath(file) not in same_file]
    return [(same_content[key], file) for key, file in fresh if key in same_content]


def _check_files(data: DataConfig, lists: Lists, check: Check) -> None:
    for (_, name), listed in lists.items():
        check.attempt(KINDS[data.kind_of(name)].load, listed.samples, data, advice=REPAIR)


def manifest_of(data: DataConfig) -> dict:
    """Return the manifest of the data root, completed by that of the lists `{dataset}_pairs.json`; empty if there is none."""
    paths = (Path(data.root) / MANIFEST, pairs_path(Path(data.root), data.dataset))
    return {key: value for path in paths for key, value in read_manifest(path).items()}


def _check_manifest(data: DataConfig, lists: Lists, check: Check) -> None:
    """Only for lists under the data root; where rows are not paired by object, only counts given per modality say anything."""
    counts = (check.attempt(manifest_of, data) or {}).get("counts")
    if not isinstance(counts, dict):
        check.notes.append(f"no manifest with counts in {data.root}: nothing to compare")
        return
    for (split, name), listed in lists.items():
        expected, found = counts.get(split), len(listed.samples)
        if isinstance(expected, dict):
            expected = expected.get(name)
        elif data.pairing != "instance":
            expected = None
        prepared = listed.samples.path == default_list_path(data.root, data.dataset, name, split)
        if prepared and expected not in (None, found):
            check.problems.append(f"{listed.samples.path} has {found} rows, the manifest says {expected}; correct it, {REMAKE}")
