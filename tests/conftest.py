"""Fixtures that every test may use; each test has its own cache, never the user's."""

import os
from pathlib import Path

import pytest

pytest_plugins = ["tests.checkpoints", "tests.bench.made_up", "tests.evaluation.local_tasks"]

REPOSITORY = Path(__file__).parents[1]
BUNDLED = REPOSITORY / "src" / "relufy" / "assets" / "llama-prose-3m"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test an empty cache folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RELUFY_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def kit() -> Path:
    """Return the folder of real models and texts ($RELUFY_KIT); skip the test where there is none."""
    folder = Path(os.environ.get("RELUFY_KIT", REPOSITORY.parent / "shared" / "kit"))
    if not folder.is_dir():
        pytest.skip("needs the kit of real models and texts: set RELUFY_KIT")
    return folder


@pytest.fixture(scope="session")
def bundled() -> Path:
    """Return the folder of the bundled model."""
    return BUNDLED
