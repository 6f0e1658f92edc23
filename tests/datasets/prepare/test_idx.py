"""Download of MNIST from a local server: complete, missing, damaged and cut-off files."""

import functools
import gzip
import hashlib
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torchvision

from datasets.prepare.readers.idx import download_mnist, read_mnist
from utils.errors import UserError

NAMES = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Folder that a local server offers as MNIST's only mirror, with five digits per split."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name in NAMES:
        shape = (5, 28, 28) if "images" in name else (5,)
        body = np.arange(np.prod(shape)) % 10
        folder.joinpath(name).write_bytes(gzip.compress(struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape) + body.astype(np.uint8).tobytes()))
    sums = [(name, hashlib.md5(folder.joinpath(name).read_bytes()).hexdigest()) for name in NAMES]
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", sums)
    yield folder
    server.shutdown()
    server.server_close()


def test_a_complete_download_is_read(mirror, tmp_path):
    splits = read_mnist(download_mnist(tmp_path / "raw"))
    assert splits["train"].images.shape == (5, 28, 28) and splits["test"].labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_bytes(b"<html>blocked</html>"), lambda file: file.write_bytes(file.read_bytes()[:-9])])
def test_what_cannot_be_had_is_named_and_can_be_tried_again(mirror, tmp_path, harm):
    whole = (mirror / NAMES[2]).read_bytes()
    harm(mirror / NAMES[2])
    with pytest.raises(UserError, match="could not be downloaded.*by hand.*--mnist FOLDER"):
        download_mnist(tmp_path / "raw")
    (mirror / NAMES[2]).write_bytes(whole)
    assert len(read_mnist(download_mnist(tmp_path / "raw"))["test"].ids) == 5
