"""The rows of an evaluation's table: one metric of one task, before and after, and a verdict in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relufy.evaluation.paired import PairedTest, could_have_seen, holm, paired_test
from relufy.evaluation.scores import Scores


@dataclass(frozen=True)
class Row:
    """`p` is corrected for the number of tests (Holm), the test's own is not. None: there is none."""

    name: str
    metric: str
    group: str | None
    higher_is_better: bool
    before: Scores | None
    after: Scores
    test: PairedTest | None
    p: float | None
    could_have_seen: float | None
    is_above_chance: tuple[bool | None, bool | None]
    """Before and after; None where chance is not known."""
    level: float

    @property
    def verdict(self) -> str:
        """Return what the row says, in plain words."""
        if self.before is None:
            return self._verdict_alone()
        if self.test is None:
            return "not paired: the two models read other tokens"
        if math.isnan(self.test.standard_error):
            return "one document says nothing"
        seen = self.p is not None and self.p < self.level
        if self.is_above_chance == (False, False):
            return f"{self._neither()}: {self._change() if seen else 'says nothing'}"
        if (share := self._same_extreme()) is not None:
            return f"both at {share} %: says nothing"
        return self._with_chance(self._change() if seen else self._no_difference())

    def _verdict_alone(self) -> str:
        above = self.is_above_chance[1]
        if above is None:
            return ""
        words = f"above {self._chance()}" if above else f"no better than {self._chance()}: says nothing"
        return words if self._constant() is None else words.replace("above", "better than")

    def _with_chance(self, words: str) -> str:
        if self.is_above_chance == (True, False):
            return f"{words}; now no better than {self._chance()}"
        if self.is_above_chance == (False, True):
            return f"{words}; before no better than {self._chance()}"
        return words

    def _neither(self) -> str:
        return f"both at {self._chance()}" if self._constant() is None else f"neither beats {self._chance()}"

    def _chance(self) -> str:
        assert self.after.chance is not None
        if (constant := self._constant()) is not None:
            return f"one constant answer ({100 * constant:.1f} %)"
        return f"chance ({100 * self.after.chance.level:.1f} %)"

    def _constant(self) -> float | None:
        """Return what one constant answer gets where that is more than guessing."""
        return self.after.chance and self.after.chance.better_constant

    def _same_extreme(self) -> int | None:
        """Return 0 or 100 if both models get no document right, or all."""
        if self.before is None or not (self.before.is_binary and self.after.is_binary):
            return None
        values = {self.before.value, self.after.value}
        return next((int(100 * end) for end in (0.0, 1.0) if values == {end}), None)

    def _change(self) -> str:
        assert self.test is not None
        rises = self.test.difference > 0
        words = f"{'higher' if rises else 'lower'} by {self._amount(abs(self.test.difference))}"
        scale, unit = self._unit()
        words += f" \u00b1 {_number(self.test.standard_error * scale)}{unit}"
        return words if self.higher_is_better else f"{words} ({'worse' if rises else 'better'})"

    def _no_difference(self) -> str:
        assert self.could_have_seen is not None
        scale, unit = self._unit()
        return f"no difference seen (could have seen {_number(self.could_have_seen * scale)}{unit})"

    def _amount(self, value: float) -> str:
        return _number(value * self._unit()[0])

    def _unit(self) -> tuple[float, str]:
        """Return what to multiply by, and the unit then: points are hundredths of a share."""
        return (100.0, " points") if self.after.is_share else (1.0, "")

    def to_json(self) -> dict[str, Any]:
        """Return plain data; what is no number is NaN."""
        chance, test = self.after.chance, self.test
        return {
            "name": self.name,
            "metric": self.metric,
            "group": self.group,
            "higher_is_better": self.higher_is_better,
            "before": _figure(self.before, self.is_above_chance[0]),
            "after": _figure(self.after, self.is_above_chance[1]),
            "difference": test and test.difference,
            "standard_error": test and test.standard_error,
            "p": self.p,
            "p_alone": test and test.p,
            "test": test and test.test,
            "could_have_seen": self.could_have_seen,
            "chance": chance and chance.level,
            "constant_answer": chance and chance.constant,
            "verdict": self.verdict,
            "num_docs": len(self.after.items),
        }


def _figure(scores: Scores | None, is_above_chance: bool | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    return {
        "value": scores.value,
        "standard_error": scores.standard_error,
        "is_above_chance": is_above_chance,
    }


def _number(value: float) -> str:
    """Write a number with two digits that matter, more of large ones."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, min(6, 1 - math.floor(math.log10(abs(value)))))}f}"


def make_rows(
    before: Sequence[Scores] | None,
    after: Sequence[Scores],
    level: float,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> list[Row]:
    """Return the rows of what was asked for; tasks that belong to a group follow it, tested on their own.

    The tests of what was asked for are corrected together (Holm), and those within each group.
    """
    earlier = {(s.name, s.metric): s for s in before or ()}
    pairs = [(earlier.get((s.name, s.metric)), s) for s in after]
    owner = {task: group for group, tasks in (groups or {}).items() for task in tasks}
    rows: list[Row] = []
    for family in dict.fromkeys(owner.get(s.name) for s in after):
        members = [(b, a) for b, a in pairs if owner.get(a.name) == family]
        rows += _family_rows(members, family, level)
    return rows


def _family_rows(pairs: Sequence[tuple[Scores | None, Scores]], group: str | None, level: float) -> list[Row]:
    tests = [_tested(before, after) for before, after in pairs]
    alone = {a.test_name: t.p for (_, a), t in zip(pairs, tests, strict=True) if t is not None}
    corrected = holm(alone)
    return [
        Row(
            name=after.name,
            metric=after.metric,
            group=group,
            higher_is_better=after.higher_is_better,
            before=before,
            after=after,
            test=test,
            p=None if test is None else corrected[after.test_name],
            could_have_seen=test and could_have_seen(test, len(after.items), level / len(alone)),
            is_above_chance=(_is_above(before), _is_above(after)),
            level=level,
        )
        for (before, after), test in zip(pairs, tests, strict=True)
    ]


def _tested(before: Scores | None, after: Scores) -> PairedTest | None:
    if before is None or before.documents != after.documents:
        return None
    return paired_test(before, after)


def _is_above(scores: Scores | None) -> bool | None:
    if scores is None or scores.chance is None or not scores.is_binary:
        return None
    return scores.chance.is_beaten_by(round(sum(scores.items)))
