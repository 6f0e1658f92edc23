"""The commands of search.py: build, add, update, remove, verify, stats, query, serve."""

import argparse
import sys
from pathlib import Path
from typing import Any

from search import indexing, page
from search.files import read_sample
from search.model import Model
from search.query import Searcher
from search.store import Index
from utils.engine.checkpoint import atomic_write_text
from utils.engine.device import select_device
from utils.errors import UserError
from utils.evaluation.features import REPRESENTATIONS
from utils.evaluation.metrics import RANKINGS
from utils.modalities import MODALITIES


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    whole = argparse.ArgumentParser(prog="search.py", description="Search in a collection with a trained run; see docs/search.md.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, (action, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(action=action)
        if name != "build":
            command.add_argument("index")
        if name in ("build", "add", "update", "remove"):
            command.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        if name in ("build", "update"):
            command.add_argument("--ann", action="store_true", help="make LanceDB's ANN index too")
        if name in ("add", "update", "query", "serve"):
            command.add_argument("--run", help="run folder, if it has moved")
        if name in ("build", "add", "update", "query", "serve"):
            command.add_argument("--device", default="auto")
    commands.choices["add"].add_argument("collection", nargs="+", metavar="DIR|LIST|FILE")
    commands.choices["remove"].add_argument("path", nargs="+")
    commands.choices["serve"].add_argument("--port", type=int, default=7860)
    _add_build_options(commands.choices["build"])
    _add_query_options(commands.choices["query"])
    return whole


def _add_build_options(build: argparse.ArgumentParser) -> None:
    build.add_argument("--run", required=True, help="run folder of train_step1.py or train_step2.py")
    build.add_argument("--collection", required=True, metavar="DIR|LIST", help="folder, list of files, or one file")
    build.add_argument("--index", required=True, help="folder of the index, or an address of object storage")
    build.add_argument("--modality", choices=MODALITIES, help="what the collection holds; default: the run's only 3D modality")
    build.add_argument("--representation", choices=REPRESENTATIONS, help="what is compared; default: the run's eval.representation")
    build.add_argument("--no-graph", dest="graph", action="store_false", help="without neighbour graph, which --ranking diffusion needs")
    build.add_argument("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                       help="where the training data lie now, e.g. data.root=DIR")


def _add_query_options(query: argparse.ArgumentParser) -> None:
    query.add_argument("picture", nargs="+")
    query.add_argument("-k", type=int, default=10, help="results per query")
    query.add_argument("--as", dest="modality", choices=MODALITIES, help="modality of the queries; default: by their files")
    query.add_argument("--ranking", choices=RANKINGS, default="plain")
    query.add_argument("--ann", action="store_true", help="approximate, through LanceDB's index (see update --ann)")
    form = query.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--csv", action="store_true")
    form.add_argument("--html", metavar="FILE")


def main(argv: list[str] | None = None) -> None:
    """Run one command; `verify` exits with 1 if something is wrong."""
    arguments = parser().parse_args(argv)
    arguments.action(arguments)


def _build(arguments: argparse.Namespace) -> None:
    model = Model(arguments.run, select_device(arguments.device), arguments.overrides)
    if arguments.dry_run and not indexing.exists(arguments.index):
        paths = [problem for _, problem in indexing.list_collection(arguments.collection)]
        return print(f"would make {arguments.index} of {len(paths)} files, of which {len(paths) - paths.count(None)} are to be skipped")
    index = indexing.open_or_create(
        arguments.index, model, arguments.collection, arguments.modality, arguments.representation, arguments.graph
    )
    _report(indexing.add_files(index, model, [arguments.collection], arguments.dry_run), index, arguments)


def _opened(arguments: argparse.Namespace) -> Searcher:
    return Searcher(Index(arguments.index), select_device(arguments.device), arguments.run)


def _add_files(arguments: argparse.Namespace) -> None:
    opened = _opened(arguments)
    _report(indexing.add_files(opened.index, opened.model, arguments.collection, arguments.dry_run), opened.index, arguments)


def _update(arguments: argparse.Namespace) -> None:
    opened = _opened(arguments)
    _report(indexing.update(opened.index, opened.model, arguments.dry_run), opened.index, arguments)


def _report(report: dict[str, Any], index: Index, arguments: argparse.Namespace) -> None:
    if getattr(arguments, "ann", False) and not arguments.dry_run:
        index.optimise(ann=True)
    counts = ", ".join(f"{len(paths)} {name}" for name, paths in report.items())
    print(f"{'would be' if arguments.dry_run else 'done'}: {counts}; {len(index)} items in {index.place}")
    for path, error in report["skipped"].items():
        print(f"skipped {path}: {error.code}: {error}", file=sys.stderr)


def _remove(arguments: argparse.Namespace) -> None:
    index = Index(arguments.index)
    paths = indexing.remove(index, arguments.path, arguments.dry_run)
    print(f"{'would remove' if arguments.dry_run else 'removed'} {len(paths)} items; {len(index)} in {index.place}")


def _verify(arguments: argparse.Namespace) -> None:
    index = Index(arguments.index)
    found = indexing.problems(index)
    print("\n".join([*found, f"{len(index)} items, {len(found)} problems"]))
    if found:
        sys.exit(1)


def _stats(arguments: argparse.Namespace) -> None:
    index = Index(arguments.index)
    for key in ("modality", "representation", "run", "checkpoint", "preprocessing", "collection", "graph"):
        print(f"{key}: {index.info[key]}")
    for modality, meaning in index.info["calibration"].items():
        level, kept = meaning["level"], 100 * meaning["kept"]
        print(f"queries of {modality}: unrelated ones reach cosine {level:.3f}, which {kept:.1f} % of all queries exceed")
    files = [path for path in Path(index.place).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"items: {len(index)}, ANN index: {index.has_ann}, {size} bytes on disk ({size // max(len(index), 1)} per item)")
    for row in index.columns(index.skipped, "path", "code", "reason").to_pylist():
        print(f"skipped {row['path']}: {row['code']}: {row['reason']}")


def _query(arguments: argparse.Namespace) -> None:
    if arguments.k < 1:
        raise UserError(f"-k must be at least 1, found {arguments.k}")
    opened = _opened(arguments)
    answers = opened.search(arguments.picture, arguments.k, arguments.ranking, arguments.modality, arguments.ann)
    if arguments.html:
        pictures = [indexing.picture_of(a.query, a.modality, read_sample(a.query, a.modality, opened.model.data)) for a in answers]
        atomic_write_text(arguments.html, page.as_html(answers, pictures))
        return print(f"{len(answers)} answers in {arguments.html}")
    print((page.as_json if arguments.json else page.as_csv if arguments.csv else page.as_text)(answers))


def _serve(arguments: argparse.Namespace) -> None:
    try:
        from search.app import serve
    except ImportError as error:
        raise UserError(f"the page needs Gradio ({error}): pip install -r requirements-search.txt") from error
    serve(_opened(arguments), arguments.port)


COMMANDS = {
    "build": (_build, "make an index of a collection, or finish one that was interrupted"),
    "add": (_add_files, "add files, or describe those that have changed anew"),
    "update": (_update, "describe files that have changed anew, drop those that are gone"),
    "remove": (_remove, "take files, or all files of folders, out of the index; the files stay"),
    "verify": (_verify, "compare every item with its file"), "stats": (_stats, "say what the index holds and which files were skipped"),
    "query": (_query, "find what is like pictures or shapes"), "serve": (_serve, "open a page on 127.0.0.1"),
}
