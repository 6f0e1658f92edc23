"""The start-up benchmark at toy size: both starts in this process."""

import pytest

from benchmarks import start_up
from utils.settings.data_options import DataConfig


def test_a_later_start_reads_what_the_first_stored(tmp_path):
    start_up.fabricate(tmp_path, 140, 40, 8)
    data = DataConfig(dataset="fabricated", root=str(tmp_path), modalities=("GrayImg", "PointCloud"), image_size=8, image_resize=8, num_points=32, eval_subsets=1)
    first = start_up.measure(data, 1)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / ".arrays").glob("*_list-*")}
    later = start_up.measure(data, 1)
    assert len(written) == 4 and {path: path.stat().st_mtime_ns for path in (tmp_path / ".arrays").glob("*_list-*")} == written
    assert later.keys() == first.keys() and all(value > 0 for value in later.values())
    with pytest.raises(FileExistsError):
        start_up.fabricate(tmp_path, 1, 1, 8)
