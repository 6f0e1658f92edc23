"""What both training scripts do between opening a run and its report: load, train with checkpoints, export, score, draw."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from datasets.samples import PairedSamples, embed_samples, load_test_samples, load_training_samples
from models.build import load_pretrained
from utils.engine.learner import StageLearner
from utils.engine.session import Session, fit
from utils.errors import MissingLabelsError
from utils.evaluation.report import finish, report_pretrained
from utils.evaluation.tables import Evaluator


def run_stage(
    session: Session, build: Callable[[PairedSamples], StageLearner],
    export: Callable[[Session, StageLearner], None] = lambda session, learner: None, report: Callable[..., None] = finish,
) -> StageLearner:
    """Train one stage to its last epoch, or go on where the session's checkpoint stopped.

    Args:
        session: from `utils.engine.session.open_session`.
        build: makes the learner from the training samples, which carry no labels.
        export: what follows the last epoch and precedes the report; every process calls it.
        report: as `utils.evaluation.report.finish`.
    Returns:
        The trained learner.
    Raises:
        UserError: on bad data or settings. Whatever ends the run also goes to its log.txt.
    """
    config, run, device = session.config, session.run, session.device
    with run.failures_logged():
        samples = load_training_samples(config.data, device)
        learner = build(samples)
        run.log(_circumstances(samples, session))
        evaluator, pictures = _load_evaluator(session, samples, learner)
        if session.checkpoint is None:
            report_pretrained(run, load_pretrained(learner.encoders, config.model.pretrained))
        fit(session, learner, evaluator)
        export(session, learner)
        report(run, evaluator, pictures, config.run.figures)
    return learner


def _load_evaluator(
    session: Session, samples: PairedSamples, learner: StageLearner
) -> tuple[Evaluator | None, Mapping[str, Tensor]]:
    """Return what scores the test set, and its arrays; nothing, with one line in the log, if it has no lists or no labels."""
    config, device = session.config, session.device
    try:
        test, labels = load_test_samples(config.data, device, samples)
    except MissingLabelsError as reason:
        session.run.log(f"no evaluation: {reason}")
        return None, {}
    return Evaluator(lambda: embed_samples(learner.encoders, test, config.data, device), labels), test.arrays


def _circumstances(samples: PairedSamples, session: Session) -> str:
    """Say what may change speed or the last bits of a run."""
    places = ", ".join(dict.fromkeys(str(array.device) for array in samples.arrays.values()))
    size = sum(array.nbytes for array in samples.arrays.values()) / 2**20
    kmeans = "scikit-learn" if session.device.type == "cpu" else "utils.evaluation.device_kmeans"
    return (
        f"{size:.0f} MiB of samples on {places}; k-means of {kmeans}; TF32 in products: {torch.backends.cuda.matmul.allow_tf32}, "
        f"in convolutions: {torch.backends.cudnn.allow_tf32}; {torch.get_num_threads()} CPU threads"
    )
