"""The plot of a comparison says what it shows, whatever is missing."""

from pathlib import Path
from typing import Any

import pytest

from relufy.report.comparison import plot_comparison


def row(method: str, sparsity: float, perplexity: float | None, has_bytes: bool = True) -> dict[str, Any]:
    random = {"perplexity": {"perplexity": 900.0}}
    return {
        "method": method,
        "model_level_sparsity": sparsity,
        "perplexity": {"perplexity": perplexity},
        "bytes_engine": {"dense": 4e6, "sparse": 4e6 * (1 - sparsity)} if has_bytes else None,
        "controls": {"random": random, "oracle": {"perplexity": {"perplexity": 11.0}}},
    }


def document(has_bytes: bool = True) -> dict[str, Any]:
    rows = [
        row("teal", 0.3, 11.0, has_bytes),
        row("teal", 0.5, 13.0, has_bytes),
        row("cats", 0.3, 12.0, has_bytes),
    ]
    rows += [row("cats", 0.44, 5000.0, has_bytes), row("wina", 0.4, None, has_bytes)]
    rows.append({"method": "cats", "reason": "it cannot"})
    dense = row("dense", 0.0, 10.0, has_bytes)
    return {"dense": dense, "rows": rows, "settings": {"dtype": "f32"}}


def drawn(document: dict[str, Any], folder: Path) -> str:
    plot_comparison(document, folder / "plot.svg")
    return (folder / "plot.svg").read_text()


def test_it_names_methods_controls_dense_and_axes(tmp_path: Path) -> None:
    text = drawn(document(), tmp_path)
    for word in ("teal", "cats", "dense 10.00", "oracle masks", "model_level_sparsity", "bytes_engine, f32"):
        assert word in text


def test_what_is_beyond_the_edge_is_written(tmp_path: Path) -> None:
    text = drawn(document(), tmp_path)
    assert ">5e+03<" in text and ">NaN<" in text and "random masks (900 or more)" in text


def test_without_bytes_there_is_one_panel(tmp_path: Path) -> None:
    assert "bytes_engine" not in drawn(document(has_bytes=False), tmp_path)


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_the_same_result_gives_the_same_file(name: str, tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        plot_comparison(document(), tmp_path / part / name)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
