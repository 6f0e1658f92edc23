"""search.index on fabricated vectors: exact order, keys, crashes at every write, a graph equal to one made from scratch."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

if find_spec("lancedb") is None:
    pytest.skip("search needs the packages of requirements-search.txt", allow_module_level=True)
from search.index import Index, behind, diffusion, identity, told, update_graph, vectors_of, writing
from utils.errors import UserError
from utils.evaluation.ranking import NEIGHBOURS, nearest

WIDTH = 6


def make(folder):
    return Index.create(str(folder / "index"), {"graph": False}, {"vector": WIDTH})


def put(index, numbers, seed=0):
    """Items number -> unit vector that depends on number and seed."""
    rows = np.stack([np.random.default_rng([seed, number]).standard_normal(WIDTH) for number in numbers])
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    index.put({"path": [f"/c/{number}.npy" for number in numbers], "vector": rows})


def ids_of(numbers):
    return [identity(f"/c/{number}.npy") for number in numbers]


def assert_graph_is_fresh(index):
    """The stored lists equal those of all items looked up anew."""
    assert behind(index.rows("neighbours")) == 0
    stored = index.rows("vector", "neighbours")
    ids, rows = stored["id"].to_numpy(), torch.from_numpy(vectors_of(stored))
    columns, _ = nearest(rows, rows, NEIGHBOURS, torch.arange(len(rows)))
    assert stored["neighbours"].to_pylist() == ids[columns].tolist()


def test_nearest_is_exact_and_keys_are_stable(tmp_path):
    index = make(tmp_path)
    put(index, range(300))
    put(index, range(250, 300), seed=1)  # the same keys again: replaced, not doubled
    index.put({"path": ["/c/skipped.npy", "/c/9.npy"], "code": ["empty"] * 2})  # no items, the second no longer
    index.delete(ids_of([5, 999]))
    rows = index.rows("vector")
    ids, vectors = rows["id"].to_numpy(), vectors_of(rows)
    assert len(index) == len(ids) == len(set(ids.tolist())) == 298 and identity("/c/7.npy") in ids
    for query in np.random.default_rng(2).standard_normal((5, WIDTH)):
        scores = vectors @ query.astype(np.float32).astype(np.float64)
        for count in (1, 10, 298, 400):
            found, values = index.nearest(query.astype(np.float32), count)
            assert found.tolist() == ids[np.argsort(-scores, kind="stable")][:count].tolist()
            np.testing.assert_allclose(values, np.sort(scores)[::-1][:count], rtol=1e-12)


def test_scores_equal_in_single_precision_are_told_apart(tmp_path):
    index = make(tmp_path)
    rows = np.zeros((400, WIDTH), np.float32)
    rows[:, 0], rows[:, 1] = 1, np.arange(400) * 1e-9  # single precision sees 400 equal products
    index.put({"path": [f"/c/{i}.npy" for i in range(400)], "vector": rows})
    found, _ = index.nearest(np.array([1, 0.5, 0, 0, 0, 0], np.float32), 20)
    assert found.tolist() == ids_of(range(399, 379, -1))


def test_the_graph_follows_every_change(tmp_path):
    index = make(tmp_path)
    for change in (
        lambda: None, lambda: put(index, [0]), lambda: put(index, range(10)), lambda: put(index, range(10, 120)), lambda: put(index, [300]),
        lambda: put(index, range(5), seed=1), lambda: index.delete(ids_of([3, 50, 51, 119])),
        lambda: (index.delete(ids_of([7])), put(index, [400, 401]), put(index, [8], seed=2)), lambda: None,
    ):
        change()
        update_graph(index)
        if len(index):
            assert_graph_is_fresh(index)
            assert diffusion(index, index.table.version)[1].scores(torch.ones(1, WIDTH, dtype=torch.float64)).shape == (1, len(index))


def test_a_graph_behind_its_items_is_refused(tmp_path):
    index = make(tmp_path)
    put(index, range(30))
    with pytest.raises(UserError, match="30 items are not in the neighbour graph.*search.py update"):
        diffusion(index, index.table.version)
    update_graph(index)
    put(index, [4], seed=9)
    with pytest.raises(UserError, match="no diffusion"):
        diffusion(index, index.table.version)


class Killed(BaseException):
    pass


def test_a_stop_before_or_after_the_write_of_the_graph_is_made_good(tmp_path, monkeypatch):
    index, original = make(tmp_path), Index.put
    put(index, range(60))
    update_graph(index)
    for late in (False, True):
        put(index, range(60, 70), seed=int(late))
        index.delete(ids_of([late, 20 + late]))

        def stopped(self, *given):
            if late:
                original(self, *given)
            raise Killed

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Index, "put", stopped)
            update_graph(index)
        update_graph(index)
        assert_graph_is_fresh(index)


def test_a_half_made_index_counts_as_none_and_is_completed(tmp_path):
    place = tmp_path / "index" / "items.lance"
    (place / "_versions").mkdir(parents=True)
    (place / "_versions" / ".tmp_1.manifest_5").write_bytes(b"cut")
    with pytest.raises(UserError, match="no index at .*python search.py build"):
        Index(str(place.parent))
    assert len(make(tmp_path)) == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds other files"), writing(str(tmp_path / "full"), new=True):
        pass
    with writing(str(tmp_path / "typing error"), new=False):
        pass
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"] and not (tmp_path / "typing error").exists()


@pytest.mark.parametrize("left", [0, 20, 100, -1])
@pytest.mark.parametrize("kind", ["data/*.lance", "_versions/*.manifest", "_deletions/*", "_indices/*/*.idx"])
def test_a_damaged_index_is_one_message(tmp_path, kind, left):
    index = make(tmp_path)
    put(index, range(300))
    index.finish(ann=True)
    index.delete(ids_of([3]))
    for path in sorted((tmp_path / "index" / "items.lance").glob(kind)):
        path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match="is damaged.*make it anew with python search.py build"), told(index.place):
        Index(index.place).nearest(np.ones(WIDTH, np.float32), 3, ann=True)


class Panic(BaseException):
    """As the Rust code of LanceDB raises it."""


def test_a_panic_of_the_store_is_one_message_and_an_interruption_none(tmp_path, monkeypatch):
    index = make(tmp_path)
    for error, seen in ((Panic, UserError), (KeyboardInterrupt, KeyboardInterrupt)):

        def failing(*_, **__):
            raise error("the offset of the new Buffer cannot exceed the existing length")

        monkeypatch.setattr("lancedb.table.AsyncTable.count_rows", failing)
        with pytest.raises(seen, match="offset"), told(index.place):
            len(index)


def test_a_damaged_version_is_one_message_to_who_changes_the_index(tmp_path):
    index = make(tmp_path)
    put(index, range(40)), put(index, range(10), seed=1)
    newest, older, *_ = sorted((tmp_path / "index/items.lance/_versions").glob("*.manifest"))  # named by falling numbers
    older.write_bytes(older.read_bytes()[:50])
    assert len(Index(index.place)) == 40
    with pytest.raises(UserError, match="is damaged.*make it anew"), told(index.place):
        index.finish()


def test_the_ann_index_finds_most_and_takes_in_what_is_added(tmp_path):
    index = make(tmp_path)
    put(index, range(100))
    with pytest.raises(UserError, match="at least 256"):
        index.finish(ann=True)
    put(index, range(100, 600))
    assert not index.table.list_indices()
    index.finish(ann=True)
    put(index, [999])
    index.finish()
    query = np.random.default_rng([0, 999]).standard_normal(WIDTH).astype(np.float32)
    best, found = (set(index.nearest(query, 10, ann)[0].tolist()) for ann in (False, True))
    assert index.table.list_indices() and identity("/c/999.npy") in found and len(best & found) >= 7
