"""The shell scripts, with an environment that counts as installed."""

import os
import shutil
import subprocess

from test_structure import ROOT


def test_the_search_demo_says_what_it_needs_where_nothing_was_trained(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "venv").mkdir()
    for name in ("requirements.txt", "requirements-search.txt"):
        (tmp_path / name).touch()
        (tmp_path / "venv" / f"{name}.installed").touch()
    variables = {**os.environ, "ROMO_VENV": "venv"}
    variables.pop("RUN", None)
    done = subprocess.run(["bash", "scripts/search_demo.sh"], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and "No run yet: bash scripts/quickstart.sh" in done.stderr
