"""utils/files.py, utils/engine/checkpoint.py and seed.py: nothing half-written is ever read."""

import errno
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from utils import files
from utils.engine.checkpoint import load_checkpoint, save_checkpoint
from utils.engine.seed import derive_seed, generator_for, seed_everything
from utils.errors import UserError
from utils.files import atomic_write_json, atomic_write_text


def test_round_trip_over_what_a_killed_process_left(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "rows": [{"loss": 0.5}]}
    for _ in range(2):
        save_checkpoint(tmp_path / "new" / "last.pt", state)
        torch.testing.assert_close(load_checkpoint(tmp_path / "new" / "last.pt"), state, rtol=0, atol=0)
        assert os.listdir(tmp_path / "new") == ["last.pt"]
        (tmp_path / "new/.last.pt.tmp").write_bytes(b"half a checkpoint" * 1000)


def test_missing_truncated_damaged_foreign(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="no checkpoint at .*last.pt"):
        load_checkpoint(path)
    save_checkpoint(path, {"w": torch.arange(1000.0)})
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1  # one bit of one weight
    for damaged in (b"", b"hello", content[: len(content) // 2], content[:-1], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"last.pt \({len(damaged)} bytes\) is damaged or not a checkpoint"):
            load_checkpoint(path)
    torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(path)
    torch.save({"w": np.float64(1)}, path)  # needs code execution to load: refused
    with pytest.raises(UserError, match="is damaged or not a checkpoint"):
        load_checkpoint(path)
    torch.save({"format_version": 99, "state": {}}, path)
    with pytest.raises(UserError, match="has checkpoint format 99, this code reads 1"):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [np.float64(0.5), np.ones(2), {1, 2}, torch.nn.Linear(1, 1)])
def test_what_cannot_be_loaded_is_not_saved(tmp_path, value):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(ValueError, match=r"state\['metrics'\]\[1\] is a "):
        save_checkpoint(path, {"metrics": [0.5, value]})
    assert load_checkpoint(path) == {"epoch": 1}


@pytest.mark.parametrize("call, fault", [("fsync", OSError(errno.ENOSPC, "No space left on device")), ("replace", KeyboardInterrupt())])
def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch, call, fault):
    def fail(*_):
        raise fault

    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    monkeypatch.setattr(files.os, call, fail)
    words = r"could not write .*last.pt.*No space left.*MiB free.*previous file is intact" if call == "fsync" else ""
    with pytest.raises(type(fault), match=words or None) as caught:
        save_checkpoint(path, {"epoch": 2})
    assert getattr(caught.value, "errno", None) == getattr(fault, "errno", None)
    with pytest.raises(type(fault), match="no file was left behind" if words else None):
        atomic_write_text(tmp_path / "other.txt", "text")
    monkeypatch.undo()
    assert load_checkpoint(path) == {"epoch": 1} and os.listdir(tmp_path) == ["last.pt"]


LIMITED_WRITER = """
import resource, sys, torch
from utils.engine.checkpoint import save_checkpoint
from utils.files import atomic_write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write, path, content in ((save_checkpoint, sys.argv[1], {"w": torch.zeros(1_000_000)}), (atomic_write_text, sys.argv[2], "x" * 200_000)):
    try:
        write(path, content)
    except OSError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs file-size limits of the operating system")
def test_write_that_fails_half_way(tmp_path):
    """A real failing write in the middle of torch's own writer, through a file-size limit of the process."""
    path, text = tmp_path / "last.pt", tmp_path / "list.txt"
    save_checkpoint(path, {"epoch": 1})
    text.write_text("old")
    result = subprocess.run([sys.executable, "-c", LIMITED_WRITER, path, text], capture_output=True, text=True, check=True)
    assert result.stdout.count("OSError") == 2 and result.stdout.count("previous file is intact") == 2
    assert load_checkpoint(path) == {"epoch": 1} and text.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "list.txt"]


def test_text_and_json(tmp_path):
    atomic_write_text(tmp_path / "a.txt", "größe\n")
    assert (tmp_path / "a.txt").read_bytes() == "größe\n".encode()
    atomic_write_json(tmp_path / "a.json", {"b": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, None]}
    with pytest.raises(ValueError):
        atomic_write_json(tmp_path / "a.json", float("nan"))
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, None]}


def test_seed_everything():
    draws = []
    for _ in range(2):
        seed_everything(7)
        draws.append([random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(1)), float(torch.randn(1))])
    assert draws[0] == draws[1]


def test_generator_for_is_stable_and_separates_keys():
    keys = [(0,), (1,), (0, 1), (0, "1"), (0, "augment", 1), (0, "augment1"), (0, "augment", 11), (0, "augment", 1, 1)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert derive_seed(0, "augment", 3) == 3510512661407846465  # the same in every process and release
    torch.manual_seed(1)
    first = torch.rand(3, generator=generator_for(0, "augment", np.int64(3)))
    torch.manual_seed(2)
    assert torch.equal(first, torch.rand(3, generator=generator_for(0, "augment", 3)))
    for key in (1.5, True, None):
        with pytest.raises(ValueError, match="integers or strings"):
            derive_seed(0, key)
