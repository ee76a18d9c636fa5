"""Verdicts in plain words: noise is no loss, and a task at chance says nothing."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")

from relufy.evaluation.chance import Chance
from relufy.evaluation.rows import Row, make_rows
from relufy.evaluation.scores import Scores, perplexity_per_unit, pooled

GENERATOR = np.random.default_rng(0)


def accuracy(correct: int, total: int = 200, name: str = "task", chance: Any = None) -> Scores:
    """Return scores whose first documents are right."""
    items = (1,) * correct + (0,) * (total - correct)
    documents = tuple(map(str, range(total)))
    return Scores(name, "acc", "mean", items, documents, lambda i: float(np.mean(i)), chance=chance)


def guessed(correct: int) -> Scores:
    return accuracy(correct, chance=Chance((0.5,) * 200))


def perplexity(loss: float) -> Scores:
    items = tuple((-loss * 50 + float(e), 50) for e in np.random.default_rng(1).normal(0, 5, 40))
    documents = tuple(map(str, range(40)))
    return Scores("text", "perplexity", "weighted_perplexity", items, documents, perplexity_per_unit, False)


def row(before: Scores | None, after: Scores) -> Row:
    (found,) = make_rows(None if before is None else [before], [after], 0.05)
    return found


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (guessed(160), guessed(148), "lower by 6.0 \u00b1 1.7 points"),
        (guessed(148), guessed(160), "higher by 6.0 \u00b1 1.7 points"),
        (guessed(160), guessed(158), "no difference seen (could have seen 3.0 points)"),
        (guessed(160), guessed(160), "no difference seen (could have seen 3.0 points)"),
        (guessed(105), guessed(102), "both at chance (50.0 %): says nothing"),
        (guessed(105), guessed(80), "both at chance (50.0 %): lower by 12 \u00b1 2.3 points"),
        (guessed(130), guessed(104), "lower by 13 \u00b1 2.4 points; now no better than chance (50.0 %)"),
        (guessed(104), guessed(130), "higher by 13 \u00b1 2.4 points; before no better than chance (50.0 %)"),
        (accuracy(0), accuracy(0), "both at 0 %: says nothing"),
        (None, guessed(160), "above chance (50.0 %)"),
        (None, guessed(105), "no better than chance (50.0 %): says nothing"),
        (None, accuracy(160), ""),
        (accuracy(1, 1), accuracy(0, 1), "one document says nothing"),
    ],
)
def test_verdicts_of_accuracies(before: Scores | None, after: Scores, verdict: str) -> None:
    assert row(before, after).verdict == verdict


def test_a_constant_answer_is_named_where_it_beats_guessing() -> None:
    chance = Chance((0.5,) * 200, 0.7)
    found = row(accuracy(138, chance=chance), accuracy(140, chance=chance))
    assert found.verdict == "neither beats one constant answer (70.0 %): says nothing"
    assert row(None, accuracy(170, chance=chance)).verdict == "better than one constant answer (70.0 %)"


def test_a_higher_perplexity_is_worse() -> None:
    found = row(perplexity(2.0), perplexity(2.1))
    assert found.verdict.startswith("higher by 0.7") and found.verdict.endswith("(worse)")
    assert row(perplexity(2.1), perplexity(2.0)).verdict.endswith("(better)")


def test_many_tests_are_corrected_together() -> None:
    before = [accuracy(160, name=f"task{i}") for i in range(10)]
    after = [accuracy(154 if i == 0 else 160, name=f"task{i}") for i in range(10)]
    alone = make_rows(before[:1], after[:1], 0.05)[0]
    together = make_rows(before, after, 0.05)[0]
    assert alone.verdict.startswith("lower by 3.0")
    assert together.verdict.startswith("no difference seen")
    assert together.test == alone.test and together.p == pytest.approx(10 * (alone.p or 0))


def test_metrics_of_one_log_likelihood_are_one_test() -> None:
    before, after = perplexity(2.0), perplexity(2.02)
    twice = [[s, Scores(**{**vars_of(s), "metric": "bits"})] for s in (before, after)]
    assert make_rows(*twice, 0.05)[0].p == make_rows([before], [after], 0.05)[0].p


def vars_of(scores: Scores) -> dict[str, Any]:
    return {name: getattr(scores, name) for name in scores.__dataclass_fields__}


def test_a_group_is_all_documents_of_its_tasks_and_they_follow_it() -> None:
    parts = [accuracy(50, 100, "a", Chance((0.5,) * 100)), accuracy(30, 50, "b", Chance((0.25,) * 50))]
    (whole,) = pooled("group", [[part] for part in parts])
    assert whole.value == 80 / 150 and len(whole.items) == 150
    assert whole.chance is not None and whole.chance.level == pytest.approx((100 * 0.5 + 50 * 0.25) / 150)
    rows = make_rows([whole, *parts], [whole, *parts], 0.05, {"group": ("a", "b")})
    assert [(r.name, r.group) for r in rows] == [("group", None), ("a", "group"), ("b", "group")]


def test_other_documents_are_not_compared() -> None:
    found = row(accuracy(10, 20), accuracy(10, 30))
    assert found.verdict == "not paired: the two models read other tokens" and found.p is None
    assert found.to_json()["difference"] is None


def test_json_has_what_reports_read() -> None:
    document = row(guessed(160), guessed(148)).to_json()
    assert document["before"] == {
        "value": 0.8, "standard_error": pytest.approx(0.0284, abs=1e-3), "is_above_chance": True,
    }  # fmt: skip
    assert document["difference"] == pytest.approx(-0.06) and document["num_docs"] == 200
    assert document["chance"] == 0.5 and document["p"] == document["p_alone"] < 0.001
