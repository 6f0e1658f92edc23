"""Trains both stages of RoMo with one departure of the authors' published code, none, or all; see docs/fidelity.md."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from baselines.departures import ReleasePLA, ReleaseRDL, pair_by_class, pair_shares
from baselines.true_labels import true_labels
from datasets.label_runs import exported_folder, load_pseudo_labels
from datasets.prepare.parallel import user_path
from datasets.samples import PairedSamples
from train_step1 import export
from train_step2 import choose_pseudo_labels, note_origin
from training import mark_labels, run_stage
from utils.engine.learner import StageLearner
from utils.engine.run_log import RunLog, origin
from utils.engine.session import Session, open_session, run_command
from utils.errors import UserError
from utils.evaluation.tables import Evaluator, format_table
from utils.files import atomic_write_json, read_json
from utils.settings.options import CONFIGS

VARIANTS = {
    "ours": "our protocol: no departure, score of the last epoch",
    "oracle_labels": "pseudo-labels copied from the ground truth at the position of the farthest sample of the other modality",
    "class_pairs": "training rows join different instances, mostly of one class, in the shares of the published lists",
    "batch_clip": "RCLL clips at 1 / batch size instead of 1 / K, and repeats rows",
    "shuffled_memory": "the memory banks are filled in shuffled order but read and updated by sample number",
    "test_selection": "the epoch of step 2 is chosen by its score on the test set",
    "all": "all five departures together",
}
LABELLED = frozenset({"oracle_labels", "class_pairs", "test_selection"})  # departures that read ground truth


def departures_of(variant: str) -> frozenset[str]:
    """Return the names of the departures that a variant, a key of `VARIANTS`, follows; our protocol follows none."""
    single = frozenset(VARIANTS) - {"ours", "all"}
    return single if variant == "all" else single & {variant}


def claim(request: argparse.Namespace) -> None:
    """Note the request in its folder; a UserError if another one is noted there."""
    path, wanted = request.output / "request.json", {key: value for key, value in vars(request).items() if key != "output"}
    noted = read_json(path) if path.is_file() else wanted
    differing = [f"{key}: {noted.get(key)!r} there, {value!r} now" for key, value in wanted.items() if noted.get(key) != value]
    if differing:
        raise UserError(f"{request.output} holds another run ({'; '.join(differing)}): give another --output")
    atomic_write_json(path, wanted)


def open_stage(request: argparse.Namespace, stage: str, given: list[str]) -> Session:
    """Open the newest run folder of a stage below the output, or a new one with the settings that are given."""
    runs, file = request.output / "runs", str(Path(request.config_dir) / f"{stage}.yaml")
    own = [f"run.seed={request.seed}", f"run.device={request.device}", f"run.output={runs}", "run.pseudo_labels=null"]
    own += [] if request.threads is None else [f"run.threads={request.threads}"]
    begun = sorted(runs.glob(f"*/{stage}/*/config.yaml"), key=lambda path: path.stat().st_mtime)
    arguments = argparse.Namespace(config=file, overrides=[*given, *own], resume=str(begun[-1].parent) if begun else None)
    read = ", ".join(sorted(departures_of(request.variant) & LABELLED))

    def complete(config: Any) -> Any:
        if config.data.pairing != "instance":
            found = f"found data.pairing: {config.data.pairing}"
            raise UserError(f"{file}: the variants start from rows paired by object (data.pairing: instance), {found}")
        config = choose_pseudo_labels(config, None) if stage == "step2" else config
        return mark_labels(config, None, f"labels of {config.data.dataset} ({read})" if read else None)

    return open_session(CONFIGS[stage], stage, arguments, file, complete)


def train(request: argparse.Namespace, stage: str, given: list[str]) -> tuple[RunLog, StageLearner]:
    """Train a stage as the real trainer does, but for the departures, or go on where it stopped; `given` are its settings."""
    session, departures = open_stage(request, stage, given), departures_of(request.variant)
    config, device = session.config, session.device

    def build(samples: PairedSamples) -> StageLearner:
        labels = true_labels(config.data, samples) if departures & {"oracle_labels", "class_pairs"} else {}
        if "class_pairs" in departures:
            samples, labels = pair_by_class(samples, labels, config.run.seed)
        if stage == "step1":
            return ReleasePLA(config, samples, device, departures, labels)
        found = load_pseudo_labels(config.rdl.pseudo_labels, samples, config.data)
        note_origin(session, found)
        return ReleaseRDL(config, samples, found, device, departures)

    def report(run: RunLog, evaluator: Evaluator | None, *_: Any) -> None:
        if evaluator is None:
            raise UserError("the variants are compared by their test scores: give test lists with labels")
        run.log(format_table([(f"{request.variant}, {stage}", run.read_epochs()[-1])]))  # no metrics.json: it would pass as a real run

    return session.run, run_stage(session, build, export if stage == "step1" else lambda *_: None, report)


def scores_of(run: RunLog, departures: frozenset[str]) -> dict[str, Any]:
    """Return the scores of the epoch that counts, how it was chosen, and the mean score of the last epoch."""
    scored = [row for row in run.read_epochs() if "map/avg" in row]
    chosen, selection = scored[-1], "last epoch"
    if "test_selection" in departures:
        chosen = max(scored, key=lambda row: row["map/avg"])
        selection = f"best epoch by test score ({chosen['epoch']} of {scored[-1]['epoch']})"
    scores = {key: value for key, value in chosen.items() if key.startswith("map/")}
    return {**scores, "selection": selection, "last_epoch": {"map/avg": scored[-1]["map/avg"]}}


def origin_of(runs: list[RunLog]) -> dict[str, Any]:
    """Return commit, device and training time of both stages; a change of commit between them counts as uncommitted code."""
    first, second = (read_json(run.folder / "env.json") for run in runs)
    dirty = first["git_sha"] != second["git_sha"] or first["git_dirty"] or second["git_dirty"]
    seconds = round(sum(row["seconds/train"] for run in runs for row in run.read_epochs()), 1)
    return {**origin(second), "dirty": dirty, "train_seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    """List the variants, or train one, or go on where the same call stopped, and write OUTPUT/metrics.json."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m baselines.release_protocol", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option, listing = parser.add_argument, "\n".join(f"{name:17}{text}" for name, text in VARIANTS.items())
    option("--list", action="version", version=listing, help="print the variants and stop")
    option("--config-dir", metavar="DIR", required=True, help="folder with step1.yaml and step2.yaml, e.g. configs/digits")
    option("--variant", choices=VARIANTS, required=True, help="what to train, see --list")
    option("--output", metavar="DIR", type=user_path, required=True, help="folder of this run alone; a repeated call continues it")
    option("--seed", type=int, default=0)
    for step in ("1", "2"):
        option(f"--set{step}", help=f"override settings of step {step}", metavar="KEY=VALUE", nargs="+", action="extend", default=[])
    option("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    option("--threads", type=int, help="CPU threads; default: as configured")
    request = parser.parse_args(argv)
    claim(request)
    departures = departures_of(request.variant)
    first, learner = train(request, "step1", request.set1)
    scored = ["run.eval_every=1"] * ("test_selection" in departures)
    second, _ = train(request, "step2", [*request.set2, *scored, f"rdl.pseudo_labels={exported_folder(first, None)}"])
    details = {"pairs": pair_shares(learner.samples, learner.labels)} if "class_pairs" in departures else {}
    details |= {"pseudo_label_accuracy": learner.kept[0]} if "oracle_labels" in departures else {}
    atomic_write_json(request.output / "metrics.json", {
        "variant": request.variant, "seed": request.seed, **scores_of(second, departures), "details": details,
        "command": shlex.join(["python", "-m", "baselines.release_protocol", *argv]), **origin_of([first, second]),
    })
    print(f"wrote {request.output / 'metrics.json'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
