"""What an evaluation found: plain data, and tables in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relufy.document import PACKAGES, heading
from relufy.evaluation.rows import Row
from relufy.schema import finite

DEFINITIONS = {
    "standard_error": "over documents (windows of a text); of a difference: over pairs of the same document",
    "difference": "after - before, in the unit of the metric",
    "p": "two-sided, corrected for the number of tests (Holm): mcnemar, exact, for right or wrong; sign-flip "
    "for other means and log-likelihoods; swap for everything else",
    "p_alone": "the same, uncorrected",
    "could_have_seen": "the difference that would be found in four of five repetitions",
    "chance": "the mean of 1 / choices; a score is above it when guessing gives as much with a probability "
    "below 0.05",
    "constant_answer": "the share of the commonest right answer, where all documents have the same choices",
    "perplexity per token": "exp of the mean loss of a predicted token; every token is predicted, in windows "
    "opened by the token that begins texts, or else by the one before",
    "perplexity per byte": "exp of all loss over the UTF-8 bytes of the predicted text",
    "perplexity per word": "exp of all loss over its words, which whitespace separates",
}
COLUMNS = ("task", "metric", "docs", "before", "after", "difference", "p", "verdict")


@dataclass(frozen=True)
class TextFacts:
    """What of a text was read: its predicted tokens, bytes and words, in windows of at most `window`."""

    files: tuple[str, ...]
    tokens: int
    bytes: int
    words: int
    windows: int
    window: int


@dataclass(frozen=True)
class Evaluation:
    """One model's scores, or two models' side by side. `facts` say how each was run."""

    model: str
    before: str | None
    facts: dict[str, Any]
    before_facts: dict[str, Any] | None
    options: dict[str, Any]
    text: TextFacts | None
    text_rows: tuple[Row, ...]
    task_rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data; what is no number is None."""
        document = {
            **heading("relufy.eval", packages=(*PACKAGES, "lm_eval", "scipy")),
            "model": self.model,
            "before": self.before,
            "run": self.facts,
            "run_before": self.before_facts,
            "options": self.options,
            "text": None
            if self.text is None
            else vars(self.text) | {"rows": [row.to_json() for row in self.text_rows]},
            "tasks": [row.to_json() for row in self.task_rows],
            "notes": list(self.notes),
            "definitions": DEFINITIONS,
        }
        return finite(document)

    def rows(self) -> list[Row]:
        """Return all rows, those of the text first."""
        return [*self.text_rows, *self.task_rows]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return columns and cells of the table that people read."""
        shown = [name for name in COLUMNS if self.before or name not in ("before", "difference", "p")]
        places = [COLUMNS.index(name) for name in shown]
        return shown, [[cells[place] for place in places] for cells in map(_cells, self.rows())]

    def to_markdown(self) -> str:
        """Return the table, notes and definitions as Markdown."""
        shown, rows = self.table()
        title = f"# {self.model}" + (f" beside {self.before}" if self.before else "")
        lines = [_line(shown), _line(["---"] * len(shown)), *map(_line, rows)]
        notes = [f"- {note}" for note in self.notes]
        meanings = [f"- {name}: {meaning}" for name, meaning in DEFINITIONS.items()]
        return "\n".join([title, "", *lines, "", *notes, "", *meanings, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(row: Row) -> list[str]:
    scale, unit = (100, " %") if row.after.is_share else (1, "")
    figures = [
        "" if scores is None else _value(scores.value * scale, scores.standard_error * scale, unit)
        for scores in (row.before, row.after)
    ]
    difference = (
        "" if row.test is None else _signed(row.test.difference * scale, row.test.standard_error * scale)
    )
    p = "" if row.p is None else f"{row.p:.2g}"
    name = f"  {row.name}" if row.group else row.name
    return [name, row.metric, f"{len(row.after.items):,}", *figures, difference, p, row.verdict]


def _value(value: float, error: float, unit: str) -> str:
    digits = 1 if unit else (2 if value < 1000 else 0)
    return f"{value:,.{digits}f} \u00b1 {error:,.{digits}f}{unit}"


def _signed(value: float, error: float) -> str:
    return f"{value:+.3g} \u00b1 {error:.2g}"
