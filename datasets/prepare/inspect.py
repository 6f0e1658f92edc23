"""Show what a configuration trains on: counts per class, the checks that failed, and a contact sheet of its samples.

python -m datasets.inspect CONFIG [--set KEY=VALUE ...] [--output FILE.png] [--samples 8]
"""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.kinds import KINDS
from datasets.prepare.checks import Listed, Lists, manifest_of, prepared_modalities, read_lists, run_checks
from datasets.prepare.ownership import SPLITS
from datasets.prepare.parallel import user_path
from utils.errors import UserError
from utils.evaluation.tables import align
from utils.figures.contact_sheet import Block, Tile, draw_contact_sheet
from utils.figures.thumbnails import thumbnail
from utils.settings.config import SET, load_config
from utils.settings.files import Sources, read_files
from utils.settings.options import DataConfig, Step1Config, Step2Config

TILE_PIXELS = 144
MAX_CLASSES = 100  # lines of the table; more are identifiers rather than classes


def load_data_config(path: str, overrides: Sequence[str] = ()) -> DataConfig:
    """Return the data section of a step-1 or step-2 configuration; one with a section `rdl` is of step 2."""
    second = "rdl" in read_files(path, Sources())
    return load_config(Step2Config if second else Step1Config, path, overrides).data


def class_names(data: DataConfig) -> list[str]:
    """Return the names of labels 0, 1, ...: `classes` (list) or `class_to_index` in the manifest; empty if it has neither."""
    try:
        manifest = manifest_of(data)
    except UserError:
        return []  # one of the checks reports the broken manifest
    numbers = manifest.get("class_to_index")
    names = sorted(numbers, key=numbers.get) if isinstance(numbers, dict) else manifest.get("classes")
    return [str(name) for name in names] if isinstance(names, list) else []


def _class_title(label: int, names: Sequence[str]) -> str:
    return f"{label} {names[label]}" if label < len(names) else str(label)


def count_classes(lists: Lists, names: Sequence[str]) -> str:
    """Return the table of samples per class: one column per split, or per list where the modalities differ."""
    labels = {key: listed.labels for key, listed in lists.items() if listed.labels is not None}
    if not labels:
        return "no list with labels"
    classes = np.unique(np.concatenate([np.arange(len(names)), *labels.values()]))  # by value: a label may be any number
    counts = {key: (classes[:, None] == values).sum(axis=1) for key, values in labels.items()}
    columns = {}
    for split in SPLITS:
        found = {name: values for (part, name), values in counts.items() if part == split}
        if len({values.tobytes() for values in found.values()}) == 1:
            found = {"": next(iter(found.values()))}
        columns.update({f"{split} {name}".strip(): values for name, values in found.items()})
    rows = [[_class_title(label, names), *numbers] for label, *numbers in zip(classes, *columns.values(), strict=True)]
    if len(rows) > MAX_CLASSES:
        rows = [*rows[:MAX_CLASSES], [f"... {len(rows)} in all", *("" for _ in columns)]]
    without = [f"{split} {name}" for (split, name) in lists if (split, name) not in labels]
    return align([["class", *columns], *rows]) + (f"\nwithout labels: {', '.join(without)}" if without else "")


def make_block(data: DataConfig, lists: Lists, split: str, count: int, names: Sequence[str]) -> Block | None:
    """Return one split of the contact sheet, `count` rows spread evenly over the lists; None if no list could be read.

    A line of the sheet shows the same row of every list, as training pairs them; a tile of another object than the first
    one's says so in red. Where `data.pairing` pairs nothing, every list is spread on its own and every tile names its object.
    """
    shown = {name: lists[split, name] for name in prepared_modalities(data) if (split, name) in lists}
    if not shown:
        return None
    by_object, first, lines = data.pairing == "instance", next(iter(shown)), []
    sizes = {name: len(listed.samples) for name, listed in shown.items()}
    columns = {name: np.linspace(0, size - 1, min(count, size)).astype(int).tolist() for name, size in sizes.items()}
    if by_object or (data.pairing, split) == ("class", "train"):
        columns = dict.fromkeys(shown, columns[first])
    for place in range(max(map(len, columns.values()))):
        rows = {name: rows[place] for name, rows in columns.items() if place < len(rows) and rows[place] < sizes[name]}
        expected = shown[first].samples.instance_ids[rows[first]] if by_object else None
        title = _describe(shown[first], rows[first], split, names) if by_object else ""
        tiles = [_make_tile(data, shown.get(name), rows.get(name), expected, split, names) for name in prepared_modalities(data)]
        lines.append((title, tiles))
    return Block(split, lines)


def _describe(listed: Listed, row: int, split: str, names: Sequence[str]) -> str:
    """Return the instance id and, of a test sample, its class."""
    text = listed.samples.instance_ids[row]
    return text if split == "train" or listed.labels is None else f"{text}\nclass {_class_title(listed.labels[row], names)}"


def _make_tile(
    data: DataConfig, listed: Listed | None, row: int | None, expected: str | None, split: str, names: Sequence[str]
) -> Tile:
    if listed is None or row is None:
        return Tile(None, "no row" if listed else "list not read", wrong=True)
    samples, part = listed.samples, slice(row, row + 1)
    one = dataclasses.replace(samples, **{key: getattr(samples, key)[part] for key in ("names", "files", "instance_ids")})
    try:
        sample = KINDS[data.kind_of(samples.modality)].load(one, dataclasses.replace(data, num_views=1, num_points=2))[0, 0]
    except (UserError, OSError):
        return Tile(None, "unreadable", wrong=True)  # the check that loads every file says why
    differs = expected is not None and samples.instance_ids[row] != expected
    caption = _describe(listed, row, split, names) if differs or expected is None else ""
    if samples.modality in data.features:
        return Tile(None, caption or f"{len(sample)} numbers", wrong=differs)
    return Tile(thumbnail(samples.modality, sample, TILE_PIXELS), caption, wrong=differs)


def _print_counts(data: DataConfig, lists: Lists, names: Sequence[str]) -> None:
    modalities = prepared_modalities(data)
    rows = [[name, *(len(lists[split, name].samples) if (split, name) in lists else "-" for split in SPLITS)] for name in modalities]
    print(f"data set    {data.dataset}\nroot        {data.root}\nmodalities  {', '.join(data.modalities)}")
    print(f"beside them {', '.join(modalities[len(data.modalities) :]) or 'none'}\npairing     {data.pairing}\n")
    print(align([["rows", *SPLITS], *rows]), count_classes(lists, names), sep="\n\n", end="\n\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process. Ends with exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="YAML file of step 1 or step 2")
    parser.add_argument("--set", **SET, help="override settings")
    parser.add_argument("--output", metavar="FILE.png", type=user_path, help="contact sheet; default {dataset}_contact_sheet.png here")
    parser.add_argument("--samples", type=int, default=8, help="objects per split on the contact sheet")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        raise UserError(f"--samples must be at least 1, found {options.samples}")
    data = load_data_config(options.config, options.overrides)
    names = class_names(data)
    lists, checks = read_lists(data)
    _print_counts(data, lists, names)
    failed = False
    for check in itertools.chain(checks, run_checks(data, lists)):
        print(*check.lines(), sep="\n", flush=True)
        failed |= bool(check.problems)
    blocks = [block for split in SPLITS if (block := make_block(data, lists, split, options.samples, names))]
    if blocks:
        path = options.output or Path(f"{data.dataset}_contact_sheet.png")
        draw_contact_sheet(f"{data.dataset}, pairing: {data.pairing}", prepared_modalities(data), blocks, path)
        print(f"contact sheet in {path}")
    else:
        print("no contact sheet: no list could be read")
    if failed:
        raise SystemExit(1)
