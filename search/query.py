"""Answers: the items of an index nearest to a picture or a shape, and how much each similarity means."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from search.files import modality_of, read_sample
from search.graph import diffusion
from search.indexing import picture_of
from search.model import Model
from search.store import Index, best_first
from utils.errors import UserError


@dataclass(frozen=True)
class Answer:
    """What was found for the file `query`, seen as `modality`.

    Attributes:
        picture: PNG of the query.
        results: dictionaries of rank, path, score (of the ranking), cosine, farther (share 0..1 of random pairs that are farther
            apart) and thumbnail (PNG), best first.
        nothing: the best cosine does not reach `level`, below which unrelated queries stay, so these are no matches.
    """

    query: str
    modality: str
    picture: bytes
    results: list[dict[str, Any]]
    nothing: bool
    level: float

    def plain(self) -> dict[str, Any]:
        """Return it without thumbnails, for JSON."""
        rows = [{key: value for key, value in row.items() if key != "thumbnail"} for row in self.results]
        return {"query": self.query, "modality": self.modality, "nothing_like_this": self.nothing, "level": self.level, "results": rows}


class Searcher:
    """An index and the model that made it, in the folder `run` if that is no longer where the index says; refuses another model.

    `up` is the vertical axis of shapes that are asked for, by default that of the collection.
    """

    def __init__(self, index: Index, device: torch.device, run: str | None = None, up: str | None = None) -> None:
        self.up = up or index.info["up"]
        self.index, self.model = index, Model(run or index.info["run"], device)
        self.model.check(index.info, index.place)
        self._graph = None, None  # versions of the index and its `diffusion`

    def search(
        self, paths: list[str], count: int = 10, ranking: str = "plain", modality: str | None = None, ann: bool = False
    ) -> list[Answer]:
        """Answer one query per file: its `count` best items, by similarity or by diffusion over the stored neighbour graph."""
        if not len(self.index):
            raise UserError(f"{self.index.place} holds no item: add some with python search.py add {self.index.place} DIR")
        if count < 1:
            raise UserError(f"-k must be at least 1, found {count}")
        if modality and modality not in self.model.encoders:
            raise UserError(f"queries may be of {' or '.join(self.model.encoders)}, which the run has learned, found --as {modality}")
        if ann and not (ranking == "plain" and self.index.has_ann):
            raise UserError(f"--ann needs --ranking plain and an ANN index: python search.py update {self.index.place} --ann")
        return [self._answer(path, count, ranking, modality, ann) for path in paths]

    def _answer(self, path: str, count: int, ranking: str, wanted: str | None, ann: bool) -> Answer:
        try:
            modality = modality_of(path, [wanted] if wanted else list(self.model.encoders))
            sample = read_sample(path, modality, self.model.data, self.up)
            features = self.model.describe(modality, [sample])
        except UserError as error:
            raise UserError(f"{path} is no query: {error}") from error
        query = features.represent(self.index.info["representation"])
        if ranking == "diffusion":
            versions = self.index.items.version, self.index.graph.version
            if self._graph[0] != versions:
                self._graph = versions, diffusion(self.index)
            ids, graph = self._graph[1]
            scores = graph.scores(query.double())[0].numpy()
            order = best_first(ids, scores)[:count]
            ids, scores = ids[order], scores[order]
        else:
            ids, scores = self.index.nearest(query[0].numpy(), count, ann)
        column = "vector" if self.index.info["representation"] == "embedding" else "embedding"
        found = self.index.rows(ids, "path", "thumbnail", column)
        meaning, rows = self.index.info["calibration"][modality], [found[number] for number in ids.tolist()]
        cosines = np.array([row[column] for row in rows], dtype=np.float64) @ features.embeddings[0].double().numpy()
        farther = np.interp(cosines, meaning["quantiles"], np.linspace(0, 1, len(meaning["quantiles"])))
        results = [
            {"rank": rank, "path": row["path"], "score": score, "cosine": cosine, "farther": share, "thumbnail": row["thumbnail"]}
            for rank, (row, score, cosine, share) in enumerate(zip(rows, scores.tolist(), cosines.tolist(), farther.tolist()), start=1)
        ]
        return Answer(path, modality, picture_of(path, modality, sample), results, bool(cosines.max() < meaning["level"]), meaning["level"])
