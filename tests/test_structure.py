"""The arrows of the design: imports point downward, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPOSITORY

SOURCE = REPOSITORY / "src" / "relufy"
BASE = {
    "recipe",
    "method",
    "activation_sparsity",
    "schema",
    "document",
    "processes",
    "text",
    "text_sample",
    "files",
    "errors",
    "fingerprint",
    "hub",
    "recipes",
    "assets",
    "plot_style",
}
WINGS_BELOW = {
    "cli": {
        "demo",
        "serve",
        "bench",
        "report",
        "doctor",
        "methods",
        "train",
        "evaluation",
        "measure",
        "engine",
        "model",
    },
    "demo": {"serve", "bench", "report", "methods", "train", "measure", "engine", "model"},
    "serve": {"methods", "train", "measure", "engine", "model"},
    "bench": {"methods", "train", "measure", "engine", "model"},
    "report": {"methods", "train", "measure", "engine", "model"},
    "doctor": {"methods", "measure", "engine", "model"},
    "methods": {"measure", "engine", "model"},
    "train": {"methods", "measure", "engine", "model"},
    "evaluation": {"measure", "engine", "model"},
    "measure": {"engine", "model"},
    "engine": set(),
    "model": set(),
}
"""What each wing may import of the other wings, besides the base files."""
HEAVY = {"torch", "transformers", "accelerate", "datasets", "peft", "matplotlib", "lm_eval", "scipy"}
TORCH_SIDE = {"doctor", "model", "methods", "train", "evaluation", "measure", "demo"}
HELP_LIBRARIES = "import typer.rich_utils, rich.markdown, rich.traceback"
HELP_SHARE = 2.0
"""How long `relufy --help` may take, in imports of the libraries that print it."""


def wing_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def sources(*wings: str) -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if not wings or wing_of(path) in wings]


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of everything that is imported anywhere below the node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_at_start(tree: ast.Module) -> Iterator[str]:
    """Yield what importing the module imports: not what waits in functions or serves type checkers alone."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield from imports(node)


@pytest.mark.parametrize("path", sources(*WINGS_BELOW), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downward(path: Path) -> None:
    wing = wing_of(path)
    found = {
        name.split(".")[1] for name in imports(ast.parse(path.read_text())) if name.startswith("relufy.")
    }
    forbidden = found - WINGS_BELOW[wing] - BASE - {wing, "__version__"}
    assert not forbidden, f"{wing} imports {sorted(forbidden)}"


@pytest.mark.parametrize("path", [SOURCE / f"{name}.py" for name in sorted(BASE)], ids=lambda path: path.name)
def test_base_files_import_no_wing(path: Path) -> None:
    if not path.exists():
        pytest.skip("a folder of data")
    found = {
        name.split(".")[1] for name in imports(ast.parse(path.read_text())) if name.startswith("relufy.")
    }
    assert found <= BASE


@pytest.mark.parametrize("path", sources("engine"), ids=lambda path: path.name)
def test_engine_never_imports_torch(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imports(ast.parse(path.read_text()))}
    assert not roots & HEAVY


def test_every_wing_is_in_the_picture() -> None:
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(WINGS_BELOW)


@pytest.mark.parametrize("path", sources("cli"), ids=lambda path: path.name)
def test_commands_import_nothing_heavy_at_start(path: Path) -> None:
    names = list(imported_at_start(ast.parse(path.read_text())))
    assert not {name.partition(".")[0] for name in names} & HEAVY
    assert not {name.split(".")[1] for name in names if name.startswith("relufy.")} & TORCH_SIDE


def run_python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("statement", ["import relufy", "import relufy.cli.main", "import relufy.engine"])
def test_no_torch_is_imported(statement: str) -> None:
    report = f"{statement}; import sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert run_python("-c", report).strip() == "[]"


def test_help_is_quick() -> None:
    help_seconds, library_seconds = [], []
    for _ in range(5):
        start = time.perf_counter()
        run_python("-c", HELP_LIBRARIES)
        library_seconds.append(time.perf_counter() - start)
        assert "sparsify" in run_python("-m", "relufy", "--help")
        help_seconds.append(time.perf_counter() - start - library_seconds[-1])
    ours, theirs = min(help_seconds), min(library_seconds)
    assert ours < HELP_SHARE * theirs, f"best of five: {ours:.2f} s, the libraries alone {theirs:.2f} s"


def test_public_names_resolve() -> None:
    listing = "import relufy; print([name for name in relufy.__all__ if not hasattr(relufy, name)])"
    assert run_python("-c", listing).strip() == "[]"


def test_unknown_public_name_is_an_attribute_error() -> None:
    import relufy

    with pytest.raises(AttributeError, match="nonsense"):
        _ = relufy.nonsense
