"""utils.engine.progress: a log gets at most ten lines, a terminal one bar."""

import io
import sys

import pytest

from utils.engine.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("total,lines", [(1, 1), (7, 7), (1000, 10)])
def test_a_file_gets_a_line_per_tenth(monkeypatch, total, lines):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress(iter(range(total)), total, "objects")) == list(range(total))
    text = sys.stderr.getvalue()
    assert "\r" not in text and len(text.splitlines()) == lines and text.splitlines()[-1].startswith(f"objects: {total} of {total},")


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress("abc", 3, "objects")) == ["a", "b", "c"]
    assert "\r" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()
