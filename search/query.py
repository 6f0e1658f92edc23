"""Answers: the items of an index nearest to a picture or a shape, and how much each similarity means."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from search.files import modality_of, read_sample
from search.graph import diffusion
from search.model import Model
from search.store import SCORE_STEPS, Index
from utils.errors import UserError
from utils.evaluation.features import Features
from utils.evaluation.ranking import DiffusionRanking


@dataclass(frozen=True)
class Answer:
    """What was found for one query.

    Attributes:
        query: path; modality: as which it was seen.
        results: dictionaries of rank, path, score (of the ranking), cosine, farther (share 0..1 of random pairs that are farther
            apart) and thumbnail (PNG), best first.
        nothing: the best cosine does not reach the level below which unrelated queries stay, so these are no matches.
        level: that level.
    """

    query: str
    modality: str
    results: list[dict[str, Any]]
    nothing: bool
    level: float

    def plain(self) -> dict[str, Any]:
        """Return it without thumbnails, for JSON."""
        rows = [{key: value for key, value in row.items() if key != "thumbnail"} for row in self.results]
        return {"query": self.query, "modality": self.modality, "nothing_like_this": self.nothing, "level": self.level, "results": rows}


class Searcher:
    """An index and the model that made it; refuses another model.

    Args:
        run: run folder, if it is no longer where the index says.
    """

    def __init__(self, index: Index, device: torch.device, run: str | None = None) -> None:
        self.index, self.model = index, Model(run or index.info["run"], device)
        self.model.check(index.info, index.place)
        self._graph = None  # versions of the index and its `diffusion`

    def describe(self, paths: list[str], modality: str | None = None) -> tuple[list[str], list[Features]]:
        """Return modality and Features (one row each) of query files; a UserError names the first that cannot be read."""
        names, samples = [], []
        for path in paths:
            try:
                names.append(modality_of(path, tuple(self.model.encoders), modality))
                samples.append(read_sample(path, names[-1], self.model.data))
            except UserError as error:
                raise UserError(f"{path} is no query: {error}") from error
        features = [None] * len(paths)
        for name in set(names):
            places = [place for place, other in enumerate(names) if other == name]
            found = self.model.describe(name, [samples[place] for place in places])
            for row, place in enumerate(places):
                features[place] = Features(found.embeddings[row : row + 1], found.posteriors[row : row + 1])
        return names, features

    def search(
        self, paths: list[str], count: int = 10, ranking: str = "plain", modality: str | None = None, ann: bool = False
    ) -> list[Answer]:
        """Answer one query per file: its `count` best items, by similarity or by diffusion over the stored neighbour graph."""
        if not len(self.index):
            raise UserError(f"{self.index.place} holds no item: add some with python search.py add {self.index.place} DIR")
        if ann and not (ranking == "plain" and self.index.has_ann):
            raise UserError(f"--ann needs --ranking plain and an ANN index: python search.py update {self.index.place} --ann")
        return [self._answer(*given, count, ranking, ann) for given in zip(paths, *self.describe(paths, modality))]

    def _answer(self, path: str, modality: str, features: Features, count: int, ranking: str, ann: bool) -> Answer:
        query = features.represent(self.index.info["representation"])
        if ranking == "diffusion":
            ids, graph = self._diffusion()
            scores = graph.scores(query.double())[0].numpy()
            order = np.lexsort([ids, -np.round(scores * SCORE_STEPS)])[:count]
            ids, scores = ids[order], scores[order]
        else:
            ids, scores = self.index.nearest(query[0].numpy(), count, ann)
        column = "vector" if self.index.info["representation"] == "embedding" else "embedding"
        rows = self.index.rows(ids, "path", "thumbnail", column)
        meaning = self.index.info["calibration"][modality]
        results = []
        for number, score in zip(ids.tolist(), scores.tolist()):
            row = rows[number]
            cosine = float(np.dot(np.asarray(row[column], dtype=np.float64), features.embeddings[0].double().numpy()))
            farther = float(np.interp(cosine, meaning["quantiles"], np.linspace(0, 1, len(meaning["quantiles"]))))
            results.append({"rank": len(results) + 1, "path": row["path"], "score": score, "cosine": cosine, "farther": farther,
                            "thumbnail": row["thumbnail"]})
        return Answer(path, modality, results, max(row["cosine"] for row in results) < meaning["level"], meaning["level"])

    def _diffusion(self) -> tuple[np.ndarray, DiffusionRanking]:
        """Return `diffusion` of the present state of the index."""
        versions = self.index.items.version, self.index.graph.version
        if self._graph is None or self._graph[0] != versions:
            self._graph = versions, diffusion(self.index)
        return self._graph[1]
