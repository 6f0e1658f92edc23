"""The commands of search.py. Those that change an index are finished, after a kill, by repeating them."""

import argparse
import os
import shlex
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from datasets.pseudo_labels import file_hash
from search import answers
from search.files import Unusable, list_collection, modality_of, need_packages, picture_of, read_sample, reading
from search.index import ITEMS, SKIPPED, Index, behind, exists, identity, told, writing
from search.model import Model
from utils.engine.device import select_device
from utils.engine.progress import progress
from utils.errors import UserError
from utils.evaluation.features import REPRESENTATIONS
from utils.evaluation.metrics import RANKINGS
from utils.files import atomic_write_text
from utils.modalities import MODALITIES
from utils.settings.config import SET

BATCH = 256  # files described and stored at once, as many as the encoders of evaluation see
CHECKED = ("modality", "representation", "graph", "up")  # options that an index remembers
REPAIRABLE = f"{ITEMS} OR code IN ('missing', 'empty', 'type', 'unreadable')"  # what another content of the file may change
FLAG = {"action": "store_true"}
WRITERS, FORMS = "build add update remove", ("--json", "--csv", "--html")
ARGUMENTS = (  # the commands that take it, its name, how it is parsed
    ("add update remove verify stats query serve", "index", {}),
    ("add", "collection", {"nargs": "+", "metavar": "DIR|LIST|FILE"}),
    ("remove", "path", {"nargs": "+"}),
    ("query", "picture", {"nargs": "+"}),
    ("build", "--run", {"required": True, "help": "run folder of train_step1.py or train_step2.py"}),
    ("build", "--collection", {"required": True, "nargs": 1, "metavar": "DIR|LIST", "help": "folder, list of files, or one file"}),
    ("build", "--index", {"required": True, "help": "folder of the index, or an address of object storage"}),
    ("build", "--modality", {"choices": MODALITIES, "help": "what the collection holds; default: the run's only 3D modality"}),
    ("build", "--representation", {"choices": REPRESENTATIONS, "help": "what is compared; default: the run's eval.representation"}),
    ("build add update query", "--up", {"choices": tuple("xyz"), "help": "vertical axis of shapes; default: see docs/search.md"}),
    ("build", "--no-graph", {"dest": "graph", "action": "store_false", "help": "no neighbour graph, which --ranking diffusion needs"}),
    ("build", "--set", {**SET, "help": "where the training data lie now, e.g. data.root=DIR"}),
    (WRITERS, "--dry-run", {**FLAG, "help": "say what would be done, and do nothing"}),
    ("build update query", "--ann", {**FLAG, "help": "make LanceDB's ANN index too; of a query: approximate, through that index"}),
    ("add update query serve", "--run", {"help": "run folder, if it has moved"}),
    ("build add update query serve", "--device", {"default": "auto"}),
    ("query", "-k", {"type": int, "default": 10, "help": "results per query"}),
    ("query", "--as", {"dest": "modality", "choices": MODALITIES, "help": "modality of the queries; default: by their files"}),
    ("query", "--ranking", {"choices": RANKINGS, "default": "plain"}),
    ("query", "--json", {"dest": "form", "action": "store_const", "const": answers.as_json, "default": answers.as_text}),
    ("query", "--csv", {"dest": "form", "action": "store_const", "const": answers.as_csv}),
    ("query", "--html", {"metavar": "FILE", "help": "write one page that works offline"}),
    ("serve", "--port", {"type": int, "default": 7860}),
)


def main(argv: list[str] | None = None) -> None:
    """Run one command; `verify` exits with 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="search.py", description="Search in a collection with a trained run; see docs/search.md.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, action in COMMANDS.items():
        command = commands.add_parser(name, help=action.__doc__, description=action.__doc__)
        forms = command.add_mutually_exclusive_group() if name == "query" else None
        for takers, argument, settings in ARGUMENTS:
            if name in takers.split():
                (forms if argument in FORMS else command).add_argument(argument, **settings)
    parser.set_defaults(collection=None, overrides=(), ann=False, dry_run=False)
    arguments = parser.parse_args(argv)
    changes = arguments.command in WRITERS.split() and not arguments.dry_run
    with told(arguments.index), writing(arguments.index, arguments.command == "build") if changes else nullcontext():
        COMMANDS[arguments.command](arguments)


def build(arguments: argparse.Namespace) -> None:
    """Make an index of a collection, or finish one that was interrupted."""
    if exists(arguments.index):
        return add(arguments)
    model, (collection,) = Model(arguments.run, select_device(arguments.device), arguments.overrides), arguments.collection
    modalities = [arguments.modality] if arguments.modality else [name for name in model.encoders if not MODALITIES[name].is_2d]
    if len(modalities) != 1 or modalities[0] not in model.encoders:
        raise UserError(f"say with --modality what the collection holds: one of {', '.join(model.encoders)}")
    need_packages((path for path, _ in list_collection(collection)), modalities[0])
    representation = arguments.representation or model.representation
    facts = {
        **model.identity, "collection": os.path.abspath(collection), "modality": modalities[0], "representation": representation,
        "graph": arguments.graph, "up": arguments.up, "calibration": {} if arguments.dry_run else model.calibrate(modalities[0]),
    }
    widths = {"vector": model.widths[representation], "embedding": model.widths["embedding"]}
    with TemporaryDirectory() as spare:
        _synchronise(arguments, Index.create(spare if arguments.dry_run else arguments.index, facts, widths), model)


def add(arguments: argparse.Namespace) -> None:
    """Describe files that are new or have changed; `update` goes through those that the index knows, and drops what is gone."""
    index, model = _opened(arguments)
    asked = {name: getattr(arguments, name, None) for name in CHECKED}
    wrong = [f"{name} {index.info[name]}" for name, value in asked.items() if value not in (None, index.info[name])]
    if wrong:
        raise UserError(f"{index.place} was built with {', '.join(wrong)}: leave these options as they were, or build another index")
    _synchronise(arguments, index, model)


def _opened(arguments: argparse.Namespace) -> tuple[Index, Model]:
    """Return an index and the model that made it; refuse another one."""
    index = Index(arguments.index)
    model = Model(arguments.run or index.info["run"], select_device(arguments.device), arguments.overrides)
    info, run = index.info, model.identity["run"]
    again = [f"--{name}={info[name]}" for name in ("collection", "modality", "representation", "up") if info[name]]
    again += ["--no-graph"] * (not info["graph"]) + [f"--set={setting}" for setting in arguments.overrides]
    for key in ("checkpoint", "preprocessing"):
        if info[key] != model.identity[key]:
            raise UserError(
                f"{index.place} was made with another model: {key} {info[key]} of {info['run']}, found {model.identity[key]} in {run}. "
                f"Give that run with --run, or describe the collection anew, and `add` what was added to it: python search.py build "
                + shlex.join(["--run", run, "--index", f"{index.place.rstrip('/')}.new", *again])
            )
    return index, model


def _synchronise(arguments: argparse.Namespace, index: Index, model: Model) -> None:
    """Describe the files of collections that the index does not hold with their present content; list those that cannot be described.

    Without collections, those of the items, and of the files that could not be described but may have been mended; what is gone is dropped.
    """
    known, gone = {row["path"]: row["sha256"] for row in index.rows("path", "sha256").to_pylist()}, []
    if arguments.collection is None:
        paths = index.rows("path", where=REPAIRABLE)["path"].to_pylist()
        listed, gone = {path: None for path in paths if os.path.isfile(path)}, [path for path in paths if not os.path.isfile(path)]
    else:
        found = (entry for place in arguments.collection for entry in list_collection(place))
        listed = {path: root for path, root in found if not Path(path).is_relative_to(os.path.abspath(index.place))}
    need_packages(listed, index.info["modality"])
    counts, skipped, batch = Counter(new=0, changed=0, unchanged=0, gone=len(gone)), {}, {}
    if not arguments.dry_run:
        index.delete(map(identity, gone))
    for path, root in progress(listed.items(), len(listed), "files"):
        try:
            with reading(path):
                modality, digest = modality_of(path, [index.info["modality"]], root), file_hash(path)
                state = "unchanged" if known.get(path) == digest else "changed" if path in known else "new"
                if state != "unchanged" and not arguments.dry_run:
                    sample = read_sample(path, modality, model.data, index.info["up"])
                    batch[path] = digest, sample, picture_of(path, modality, sample)
                counts[state] += 1
        except Unusable as error:
            skipped[os.fsencode(path).decode(errors="backslashreplace")] = error
        if len(batch) == BATCH:
            _store(index, model, batch)
            batch = {}
    if not arguments.dry_run:
        _store(index, model, batch)
        index.put({"path": list(skipped), "code": [error.code for error in skipped.values()], "reason": list(map(str, skipped.values()))})
        index.finish(arguments.ann)
    counts["skipped"] = len(skipped)
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    print(f"{'would be' if arguments.dry_run else 'done'}: {said}; {len(index)} items in {arguments.index}")
    for path, error in skipped.items():
        print(f"skipped {answers.shown(path)}: {error.code}: {error}", file=sys.stderr)


def _store(index: Index, model: Model, batch: dict[str, tuple[str, np.ndarray, bytes]]) -> None:
    """Describe files, path -> hash, sample and thumbnail."""
    modality = index.info["modality"]
    for shape in {sample.shape for _, sample, _ in batch.values()}:  # pictures may differ
        alike = {path: row for path, row in batch.items() if row[1].shape == shape}
        digests, samples, pictures = zip(*alike.values())
        features = model.describe({modality: torch.from_numpy(np.stack(samples))})[modality]
        index.put({
            "path": list(alike), "sha256": digests, "thumbnail": pictures,
            "vector": features.represent(index.info["representation"]).cpu().numpy(), "embedding": features.embeddings.cpu().numpy(),
        })


def remove(arguments: argparse.Namespace) -> None:
    """Take files, or all files of folders, out of the index; the files stay."""
    index, roots = Index(arguments.index), [os.path.abspath(os.path.expanduser(path)) for path in arguments.path]
    rows = index.rows("path", "code", where="true").to_pylist()
    rows = [row for row in rows if any(Path(row["path"]).is_relative_to(root) for root in roots)]
    if not arguments.dry_run:
        index.delete(row["id"] for row in rows)
        index.finish()
    items = sum(not row["code"] for row in rows)
    print(f"{'would remove' if arguments.dry_run else 'removed'} {items} items; {len(index)} in {index.place}")


def verify(arguments: argparse.Namespace) -> None:
    """Compare every item with its file."""
    index = Index(arguments.index)
    rows = index.rows("path", "sha256", "vector")  # all vectors, to see that they can be read
    paths, digests = rows["path"].to_pylist(), rows["sha256"].to_pylist()
    found = [f"twice: {path}" for path, count in Counter(paths).items() if count > 1]
    found += [f"missing: {path}" for path in paths if not os.path.isfile(path)]
    found += [f"changed: {path}" for path, digest in zip(paths, digests) if os.path.isfile(path) and file_hash(path) != digest]
    if index.info["graph"] and (missing := behind(index.rows("neighbours"))):
        found.append(f"graph: {missing} items are not in it, or a neighbour of theirs is gone")
    print("\n".join([*map(answers.shown, found), f"{len(rows)} items, {len(found)} problems"]))
    if found:
        sys.exit(1)


def stats(arguments: argparse.Namespace) -> None:
    """Say what the index holds and which files were skipped."""
    index = Index(arguments.index)
    calibration, ann = index.info.pop("calibration"), bool(index.table.list_indices())
    print("\n".join(f"{key}: {value}" for key, value in index.info.items()))
    for modality, meaning in calibration.items():
        print(f"queries of {modality}: unrelated ones reach cosine {meaning['level']:.3f}")
    size = sum(path.stat().st_size for path in Path(index.place).rglob("*") if path.is_file())
    print(f"items: {len(index)}, ANN index: {ann}, {size} bytes on disk ({size // max(len(index), 1)} per item)")
    for row in index.rows("path", "code", "reason", where=SKIPPED).to_pylist():
        print(f"skipped {answers.shown(row['path'])}: {row['code']}: {row['reason']}")


def query(arguments: argparse.Namespace) -> None:
    """Find what is like pictures or shapes."""
    options = arguments.picture, arguments.k, arguments.ranking, arguments.modality, arguments.ann, arguments.up
    found = answers.search(*_opened(arguments), *options)
    if not arguments.html:
        return print(arguments.form(found))
    atomic_write_text(arguments.html, answers.as_html(found))
    print(f"{len(found)} answers in {arguments.html}")


def serve(arguments: argparse.Namespace) -> None:
    """Open a page on 127.0.0.1."""
    try:
        from search.app import Page, launch, make_app
    except ImportError as error:
        raise UserError(f"the page needs Gradio ({error}): pip install -r requirements-search.txt") from error
    with TemporaryDirectory() as folder:
        launch(make_app(Page(*_opened(arguments), Path(folder))), arguments.port)


COMMANDS = {"build": build, "add": add, "update": add, "remove": remove, "verify": verify, "stats": stats, "query": query, "serve": serve}
