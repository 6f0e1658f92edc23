"""What ruff and import-linter (pyproject.toml) cannot check: lengths of files and functions, and which files are tracked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"tests", "runs", "dataset", "pretrained", "venv"}
SCRIPT_LINES, FILE_LINES, BODY_LINES, TOTAL_LINES, FILE_BYTES = 200, 250, 40, 60, 10**6


def over_budget(source, budget):
    """Names of what is too long: the file, and functions of more lines than 40 without the docstring or 60 with it."""
    if len(source.splitlines()) > budget:
        yield f"{len(source.splitlines())} lines, budget {budget}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            total = node.end_lineno - node.lineno + 1
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node, clean=False) is not None else 0
            if total - docstring > BODY_LINES or total > TOTAL_LINES:
                yield f"{node.name} ({total} lines, {docstring} of them docstring)"


def test_budgets():
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    files = [path for path in files if not any(part in SKIPPED or part.startswith(".") for part in path.parts)]
    assert {Path("train_step1.py"), Path("models/build.py")} <= set(files)
    found = {path: list(over_budget((ROOT / path).read_text(), FILE_LINES if path.parent.parts else SCRIPT_LINES)) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize("statements,docstring,over", [(39, 0, False), (40, 0, True), (39, 20, False), (39, 21, True), (10, 49, False)])
def test_the_length_check_can_fail(statements, docstring, over):
    lines = ["def f():"] + (['    """x'] + [""] * (docstring - 2) + ['    """'] if docstring else [])
    assert bool(list(over_budget("\n".join(lines + ["    x = 1"] * statements), 250))) == over
    assert list(over_budget("x = 1\n" * 3, 2)) == ["3 lines, budget 2"]


def test_evaluation_needs_no_training_code():
    program = "import evaluate, sys; print({'losses', 'train_step1', 'train_step2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_processes_that_prepare_objects_do_without_torch():
    commands = [path.stem for path in (ROOT / "datasets").glob("prepare_*.py")]
    modules = [f"datasets.{name.replace('prepare_', 'prepare.')}" for name in commands] + [f"datasets.{name}" for name in commands]
    program = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout
    assert said == "False\n" and len(commands) == 6


def test_no_large_or_generated_file_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are tracked")
    listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
                             text=True, check=True)
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    assert Path(__file__).resolve() in files
    assert [str(f) for f in files if f.is_file() and f.stat().st_size > FILE_BYTES] == []
    assert [str(f) for f in files if f.suffix in {".pyc", ".pt", ".npz", ".h5"} or "__pycache__" in f.parts] == []
