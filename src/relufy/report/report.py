"""`relufy report`: results of any kinds, in the order given, to one page."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from relufy.errors import UserError
from relufy.files import replacing
from relufy.report.content import Section, Table, share
from relufy.report.page import to_html, to_markdown
from relufy.report.run import Run, read_run, section_of

FORMATS = {".html": to_html, ".md": to_markdown}


@dataclass(frozen=True)
class Report:
    """A title, an overview, and a section for each result."""

    title: str
    overview: tuple[Table, ...]
    sections: tuple[Section, ...]

    def write(self, output: Path) -> None:
        """Write the report as the suffix says, .html or .md, whole or not at all. Raises UserError."""
        check_output(output)
        text = FORMATS[output.suffix](self.title, self.overview, self.sections)
        with replacing(output) as temporary:
            temporary.write_text(text, encoding="utf-8")


def check_output(output: Path) -> None:
    """Raise UserError if the report cannot be written in the format that the path asks for."""
    if output.suffix not in FORMATS:
        raise UserError(f"a report is written as {' or '.join(FORMATS)}, not {output.name}")


def make_report(files: Sequence[Path], title: str = "relufy report") -> Report:
    """Read results and return their report. Raises UserError for a file that is none, naming it."""
    runs = [read_run(file) for file in files]
    sections = [_with_origin(section_of(run), run) for run in runs]
    return Report(title, tuple(_overview(runs)), tuple(sections))


def _with_origin(section: Section, run: Run) -> Section:
    document = run.document
    return replace(
        section,
        file=str(run.path),
        command=str(document.get("command") or ""),
        versions=dict(document.get("versions") or {}),
    )


def _overview(runs: Sequence[Run]) -> list[Table]:
    """Return the table of measured models side by side, where there are several."""
    measured = [run.document for run in runs if run.kind == "relufy.measure"]
    if len(measured) < 2:
        return []
    rows = []
    for found in measured:
        zeros = found["sparsity"]
        sites = [share(sum(zeros[s]) / len(zeros[s])) if s in zeros else "-" for s in ("q", "neuron", "down")]
        macs = found["macs_paper"]
        ratio = f"{macs['dense'] / macs['sparse']:.2f}x"
        rows.append([found["model"], f"{found['perplexity']['perplexity']:.2f}", *sites, ratio])
    columns = ["model", "perplexity", "zeros at q", "at neuron", "at down", "macs_paper: x less"]
    return [Table("Models side by side", columns, rows)]
