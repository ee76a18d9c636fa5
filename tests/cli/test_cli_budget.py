"""`relufy sparsify --budget` behind its options: what it refuses before any work, and a whole small run."""

import json
from pathlib import Path

import pytest
from tests.conftest import BUNDLED

from relufy.cli.budget import BudgetOptions, run
from relufy.errors import UserError
from relufy.method import Teal
from relufy.methods.budget import search as budget_search
from relufy.methods.budget import singles


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "0"}, "--budget must be above 0"),
        ({"budget": "1 percent"}, "--budget takes a share"),
        ({"minutes": 0.0}, "minutes must be above 0"),
        ({"text": ()}, "--budget needs text"),
        ({"selection": ("a.txt",)}, "--selection and --test both"),
        ({"dtype": "int3"}, "int3"),
        ({"plot": Path("plot.txt")}, "plot.txt"),
        ({"text": ("absent.txt",)}, "there is no text file absent.txt"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(options: dict, message: str, tmp_path: Path) -> None:
    given = {"budget": "1%", "text": ("text.txt",), "measure": False} | options
    with pytest.raises(UserError, match=message):
        run(str(BUNDLED), tmp_path / "out", BudgetOptions(**given))
    assert not (tmp_path / "out").exists()


def test_a_search_is_saved_printed_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(singles, "SINGLES", {"teal-uniform": Teal(allocation="uniform")})
    monkeypatch.setattr(budget_search, "VARIANTS", (("bytes", "best"),))
    monkeypatch.setattr(budget_search, "ROUNDS", 0)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The {i}th house had {i * i} windows and a door of oak." for i in range(150)))
    options = BudgetOptions(
        "20%", (str(text),), window=48, windows=48, measure=False, plot=tmp_path / "p.svg", json=True
    )
    run(str(BUNDLED), tmp_path / "out", options)
    printed = json.loads(capsys.readouterr().out)
    chosen = printed["report"]["chosen"]
    block = json.loads((tmp_path / "out" / "config.json").read_text())["activation_sparsity"]
    assert chosen in printed["frontier"]
    assert block["provenance"]["search"]["chosen"] == chosen
    assert block["provenance"]["files"]["text"] == ["text.txt"]
    assert "budget 20" in (tmp_path / "p.svg").read_text()
