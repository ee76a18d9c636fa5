"""`relufy measure reuse`: the exact mode's figures at a period of one, the control, what is refused."""

import json

import numpy as np
import pytest

import relufy
from relufy.activation_sparsity import Sparsifier
from relufy.cli.main import run
from relufy.engine.reuse import Reuse
from relufy.errors import UserError
from relufy.measure.reuse import ReuseOptions, force, measure_reuse

NEURON = Sparsifier(("neuron",), "relu", shift=0.8)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It was a dark night, and the wind blew over the moor. " * 8)
    return path


def test_periods_of_one_are_exact_and_others_say_what_they_cost(make_checkpoint, text, tmp_path):
    folder = make_checkpoint(sparsifiers=(NEURON,))
    options = ReuseOptions((1, 4), ("window", "prompt"), window=3, length=40, warm_up=12, tokens=6, turns=1)
    found = measure_reuse(folder, [text], options)
    assert json.loads(json.dumps(found)) == found and found["kind"] == "relufy.measure.reuse"
    rows = {(row["reuse"]["policy"], row["reuse"]["period"], row["reuse"]["is_control"]): row
            for row in found["settings"]}  # fmt: skip
    assert len(rows) == len(found["settings"]) == 6
    for policy in ("window", "prompt"):
        one, four = rows[policy, 1, False], rows[policy, 4, False]
        assert one["perplexity"] == found["exact"]["perplexity"] and one["perplexity_change_percent"] == 0
        assert one["bytes_vs_exact"] == 1 and one["frozen_tokens"] == 0
        assert four["perplexity"] != one["perplexity"] and four["bytes_vs_exact"] < 1
        assert four["frozen_tokens"] > four["open_tokens"] > 0
        assert 0 < four["fired_share"] <= four["candidate_share"] < 1
        assert four["tokens_per_second"] > 0 and four["speedup_vs_dense"] > 0
    assert rows["window", 4, True]["fired_share"] < rows["window", 4, False]["fired_share"]


def test_a_text_forced_at_once_costs_the_same(make_checkpoint):
    engine = relufy.Engine(make_checkpoint(sparsifiers=(NEURON,)))
    reuse, windows = Reuse(3, window=4), np.random.default_rng(0).integers(0, 513, (2, 30))
    forced = force(engine, windows, 8, reuse)
    sequence = engine.new_sequence(8, reuse)
    logits = engine.step([(sequence, windows[0])], "all")[8:-1].astype(np.float64)
    chosen = logits[np.arange(len(logits)), windows[0, 9:]]
    expected = np.log(np.exp(logits).sum(1)) - chosen
    assert forced.nats[0] == pytest.approx(expected.mean(), rel=1e-12)
    assert forced.reuse.frozen_tokens + forced.reuse.open_tokens == 2 * 21


def test_wrong_options_are_refused(make_checkpoint, text):
    with pytest.raises(UserError, match="warm-up"):
        ReuseOptions(length=20, warm_up=20)
    with pytest.raises(UserError, match="did you mean 'window'"):
        ReuseOptions(policies=("windows",))
    with pytest.raises(UserError, match="can't be reused"):
        measure_reuse(make_checkpoint(), [text], ReuseOptions(length=40, warm_up=12))


def test_the_command_draws_and_tells(make_checkpoint, text, tmp_path, capsys):
    folder, plot, document = make_checkpoint(sparsifiers=(NEURON,)), tmp_path / "a.svg", tmp_path / "a.json"
    options = ["--gammas", "1,3", "--policies", "window,blocks", "--window", "40", "--warm-up", "12"]
    arguments = ["measure", "reuse", str(folder), "--text", str(text), *options, "--turns", "0"]
    assert run([*arguments, "-o", str(document), "--plot", str(plot)]) == 0
    assert "neuron reuse" in capsys.readouterr().out
    assert "change of perplexity" in plot.read_text()
    assert len(json.loads(document.read_text())["settings"]) == 6
    assert run([*arguments[:4], str(text), "--gammas", "two"]) == 2
