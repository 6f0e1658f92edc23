"""The commands of search.py: build, add, update, remove, verify, stats, query, serve."""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from search import indexing, page
from search.model import Model
from search.query import Searcher
from search.store import Index, exists, writing
from utils.engine.checkpoint import atomic_write_text
from utils.engine.device import select_device
from utils.errors import UserError
from utils.evaluation.features import REPRESENTATIONS
from utils.evaluation.metrics import RANKINGS
from utils.modalities import MODALITIES

FLAG = {"action": "store_true"}
WRITERS = "build add update remove"
ARGUMENTS = (  # the commands that take it, its name, how it is parsed
    ("add update remove verify stats query serve", "index", {}),
    ("add", "collection", {"nargs": "+", "metavar": "DIR|LIST|FILE"}),
    ("remove", "path", {"nargs": "+"}),
    ("query", "picture", {"nargs": "+"}),
    ("build", "--run", {"required": True, "help": "run folder of train_step1.py or train_step2.py"}),
    ("build", "--collection", {"required": True, "metavar": "DIR|LIST", "help": "folder, list of files, or one file"}),
    ("build", "--index", {"required": True, "help": "folder of the index, or an address of object storage"}),
    ("build", "--modality", {"choices": MODALITIES, "help": "what the collection holds; default: the run's only 3D modality"}),
    ("build", "--representation", {"choices": REPRESENTATIONS, "help": "what is compared; default: the run's eval.representation"}),
    ("build add update query", "--up", {"choices": ("x", "y", "z"), "help": "vertical axis of shapes; default: of the index, else y in GLB "
                                        "and GLTF, z in all others"}),
    ("build", "--no-graph", {"dest": "graph", "action": "store_false", "help": "no neighbour graph, which --ranking diffusion needs"}),
    ("build", "--set", {"dest": "overrides", "nargs": "+", "action": "extend", "default": [], "metavar": "KEY=VALUE",
                        "help": "where the training data lie now, e.g. data.root=DIR"}),
    (WRITERS, "--dry-run", {**FLAG, "help": "say what would be done, and do nothing"}),
    ("build update", "--ann", {**FLAG, "help": "make LanceDB's ANN index too"}),
    ("add update query serve", "--run", {"help": "run folder, if it has moved"}),
    ("build add update query serve", "--device", {"default": "auto"}),
    ("query", "-k", {"type": int, "default": 10, "help": "results per query"}),
    ("query", "--as", {"dest": "modality", "choices": MODALITIES, "help": "modality of the queries; default: by their files"}),
    ("query", "--ranking", {"choices": RANKINGS, "default": "plain"}),
    ("query", "--ann", {**FLAG, "help": "approximate, through LanceDB's index (see update --ann)"}),
    ("serve", "--port", {"type": int, "default": 7860}),
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    whole = argparse.ArgumentParser(prog="search.py", description="Search in a collection with a trained run; see docs/search.md.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        for takers, argument, settings in ARGUMENTS:
            if name in takers.split():
                command.add_argument(argument, **settings)
    form = commands.choices["query"].add_mutually_exclusive_group()
    form.add_argument("--json", **FLAG)
    form.add_argument("--csv", **FLAG)
    form.add_argument("--html", metavar="FILE")
    return whole


def main(argv: list[str] | None = None) -> None:
    """Run one command; `verify` exits with 1 if something is wrong."""
    arguments = parser().parse_args(argv)
    action, _ = COMMANDS[arguments.command]
    if arguments.command not in WRITERS.split() or arguments.dry_run:
        return action(arguments)
    with writing(arguments.index, new=arguments.command == "build"):
        action(arguments)


def _opened(arguments: argparse.Namespace) -> Searcher:
    return Searcher(Index(arguments.index), select_device(arguments.device), arguments.run, getattr(arguments, "up", None))


def _describe(arguments: argparse.Namespace) -> None:
    """Build, add and update."""
    if arguments.command == "build":
        model, collections = Model(arguments.run, select_device(arguments.device), arguments.overrides), [arguments.collection]
        if arguments.dry_run and not exists(arguments.index):
            usable = [problem is None for _, problem in indexing.list_collection(arguments.collection)]
            return print(f"would make {arguments.index} of {len(usable)} files, of which {usable.count(False)} are to be skipped")
        asked = {name: getattr(arguments, name) for name in ("modality", "representation", "graph", "up")}
        index = indexing.open_or_create(arguments.index, model, arguments.collection, asked)
    else:
        opened, collections = _opened(arguments), arguments.collection if arguments.command == "add" else None
        index, model = opened.index, opened.model
        indexing.check_same(index, {"up": arguments.up})
    report = indexing.synchronise(index, model, collections, arguments.dry_run)
    if arguments.command != "add" and arguments.ann and not arguments.dry_run:
        index.optimise(ann=True)
    counts = ", ".join(f"{len(paths)} {name}" for name, paths in report.items())
    print(f"{'would be' if arguments.dry_run else 'done'}: {counts}; {len(index)} items in {index.place}")
    for path, error in report["skipped"].items():
        print(f"skipped {page.shown(path)}: {error.code}: {error}", file=sys.stderr)


def _remove(arguments: argparse.Namespace) -> None:
    index = Index(arguments.index)
    paths = indexing.remove(index, arguments.path, arguments.dry_run)
    print(f"{'would remove' if arguments.dry_run else 'removed'} {len(paths)} items; {len(index)} in {index.place}")


def _verify(arguments: argparse.Namespace) -> None:
    index = Index(arguments.index)
    found = indexing.problems(index)
    print("\n".join([*map(page.shown, found), f"{len(index)} items, {len(found)} problems"]))
    if found:
        sys.exit(1)


def _stats(arguments: argparse.Namespace) -> None:
    index = Index(arguments.index)
    for key in ("modality", "representation", "run", "checkpoint", "preprocessing", "collection", "graph", "up"):
        print(f"{key}: {index.info[key]}")
    for modality, meaning in index.info["calibration"].items():
        level, kept = meaning["level"], 100 * meaning["kept"]
        print(f"queries of {modality}: unrelated ones reach cosine {level:.3f}, which {kept:.1f} % of all queries exceed")
    size = sum(path.stat().st_size for path in Path(index.place).rglob("*") if path.is_file())
    print(f"items: {len(index)}, ANN index: {index.has_ann}, {size} bytes on disk ({size // max(len(index), 1)} per item)")
    for row in index.columns(index.skipped, "path", "code", "reason").to_pylist():
        print(f"skipped {page.shown(row['path'])}: {row['code']}: {row['reason']}")


def _query(arguments: argparse.Namespace) -> None:
    answers = _opened(arguments).search(arguments.picture, arguments.k, arguments.ranking, arguments.modality, arguments.ann)
    if arguments.html:
        atomic_write_text(arguments.html, page.as_html(answers))
        return print(f"{len(answers)} answers in {arguments.html}")
    print((page.as_json if arguments.json else page.as_csv if arguments.csv else page.as_text)(answers))


def _serve(arguments: argparse.Namespace) -> None:
    try:
        from search.app import launch, make_app
    except ImportError as error:
        raise UserError(f"the page needs Gradio ({error}): pip install -r requirements-search.txt") from error
    with TemporaryDirectory() as folder:
        launch(make_app(_opened(arguments), Path(folder)), arguments.port)


COMMANDS = {
    "build": (_describe, "make an index of a collection, or finish one that was interrupted"),
    "add": (_describe, "add files, or describe those that have changed anew"),
    "update": (_describe, "describe files that have changed anew, drop those that are gone"),
    "remove": (_remove, "take files, or all files of folders, out of the index; the files stay"),
    "verify": (_verify, "compare every item with its file"), "stats": (_stats, "say what the index holds and which files were skipped"),
    "query": (_query, "find what is like pictures or shapes"), "serve": (_serve, "open a page on 127.0.0.1"),
}
