"""The layout rules, checked on the syntax tree: who may import whom, and how long files and functions may be."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"tests", "runs", "dataset", "pretrained", "pseudo_labels", "__pycache__", "venv", "node_modules"}
PACKAGES = {"datasets", "experiments", "losses", "models", "utils"}
MAY_IMPORT = {
    "utils": {"utils"}, "losses": {"losses"}, "models": {"models", "utils"}, "datasets": {"datasets", "utils"},
    "experiments": {"experiments", "utils"},
}
SCRIPT_LINES, FILE_LINES, BODY_LINES, TOTAL_LINES, FILE_BYTES = 200, 250, 40, 60, 10**6


def source_files():
    """Python files of the project but for the tests, relative to the root."""
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    return sorted(p for p in found if not any(part in SKIPPED or part.startswith(".") for part in p.parts))


SOURCES = source_files()
ROOT_SCRIPTS = {path.stem for path in SOURCES if len(path.parts) == 1}
OUTSIDE = ROOT_SCRIPTS | {"tests", "benchmarks", "baselines", "scripts"}  # import everything, imported by nothing


def imported_modules(tree, path):
    """Dotted names of all modules that a file imports, at any depth and by any means; relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[:-node.level] if node.level else ()
            base = ".".join([*package, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def import_errors(source, path):
    """Names of forbidden imports of a file with this source at this path below the root."""
    package = path.parts[0] if len(path.parts) > 1 else None
    tops = {name.split(".")[0] for name in imported_modules(ast.parse(source), path)}
    wrong = tops & OUTSIDE if package != "tests" else set()
    if package in ("benchmarks", "baselines"):  # they measure and vary the stages
        wrong -= ROOT_SCRIPTS | {package}
    if package in MAY_IMPORT:
        wrong |= (tops & PACKAGES) - MAY_IMPORT[package]
    if package == "losses":
        wrong |= tops - {"losses", "torch"} - sys.stdlib_module_names
    return sorted(wrong)


def long_functions(source):
    """Names of functions over budget: more than 40 lines without the docstring, or more than 60 with it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            total = node.end_lineno - node.lineno + 1
            documented = ast.get_docstring(node, clean=False) is not None
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if documented else 0
            if total - docstring > BODY_LINES or total > TOTAL_LINES:
                yield f"{node.name} ({total} lines, {docstring} of them docstring)"


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_layout_is_found():
    assert {"train_step1", "train_step2", "evaluate"} <= ROOT_SCRIPTS
    assert PACKAGES <= {path.parts[0] for path in SOURCES}
    assert all((ROOT / package / "__init__.py").exists() for package in PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_import_direction(path):
    assert import_errors(read(path), path) == []


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_budgets(path):
    source = read(path)
    budget = SCRIPT_LINES if len(path.parts) == 1 else FILE_LINES
    assert len(source.splitlines()) <= budget, f"{path} has {len(source.splitlines())} lines, budget {budget}"
    assert list(long_functions(source)) == []


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_module_says_what_it_is_and_imports_no_star(path):
    tree = ast.parse(read(path))
    assert ast.get_docstring(tree)
    assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
    assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.type is None]


def test_evaluation_needs_no_training_code():
    names = set(imported_modules(ast.parse(read("evaluate.py")), Path("evaluate.py")))
    assert not {name for name in names if name.split(".")[0] in ("losses", "train_step1", "train_step2")}


def test_no_large_or_generated_file_is_tracked():
    git = shutil.which("git")
    listing = git and subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if not listing or listing.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are tracked")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    assert Path(__file__).resolve() in files
    assert [str(f) for f in files if f.is_file() and f.stat().st_size > FILE_BYTES] == []
    assert [str(f) for f in files if f.suffix in {".pyc", ".pt", ".npz", ".h5"} or "__pycache__" in f.parts] == []


@pytest.mark.parametrize("path,line,wrong", [
    ("utils/a.py", "import models", ["models"]), ("utils/a.py", "from datasets import lists", ["datasets"]),
    ("utils/a.py", "def f():\n    import losses.x", ["losses"]), ("utils/a.py", "from .. import models", ["models"]),
    ("utils/a.py", "from ..models import heads", ["models"]), ("utils/a.py", "from . import seed", []),
    ("utils/a.py", "import importlib\nimportlib.import_module('models.heads')", ["models"]),
    ("utils/a.py", "import numpy, torch, utils.engine.seed", []), ("losses/a.py", "import torch.nn, math", []),
    ("losses/a.py", "import numpy", ["numpy"]), ("losses/a.py", "from utils import seed", ["utils"]),
    ("models/a.py", "from utils import seed\nimport torchvision", []), ("models/a.py", "import datasets", ["datasets"]),
    ("datasets/a.py", "import models", ["models"]), ("datasets/a.py", "from train_step1 import main", ["train_step1"]),
    ("train_step2.py", "import train_step1", ["train_step1"]), ("train_step2.py", "import models, utils, losses", []),
    ("experiments/a.py", "import utils, experiments.cells, numpy", []), ("experiments/a.py", "import losses, models", ["losses", "models"]),
    ("experiments/a.py", "from train_step1 import main", ["train_step1"]), ("models/a.py", "import experiments.cells", ["experiments"]),
    ("reproduce.py", "import experiments.cells, losses", []), ("utils/a.py", "import tests.test_config", ["tests"]), ("benchmarks/a.py", "import models, evaluate, benchmarks.floors", []),
    ("benchmarks/a.py", "import baselines, tests.test_config", ["baselines", "tests"]), ("models/a.py", "import benchmarks", ["benchmarks"]),
])
def test_the_import_check_can_fail(path, line, wrong):
    assert import_errors(line, Path(path)) == wrong


@pytest.mark.parametrize("statements,docstring,over", [(39, 0, False), (40, 0, True), (39, 20, False), (39, 21, True), (10, 49, False)])
def test_the_length_check_can_fail(statements, docstring, over):
    lines = ["def f():"] + (['    """x'] + [""] * (docstring - 2) + ['    """'] if docstring else [])
    source = "\n".join(lines + ["    x = 1"] * statements)
    assert bool(list(long_functions(source))) == over
