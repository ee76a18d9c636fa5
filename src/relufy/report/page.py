"""The report as one HTML page, with nothing loaded from elsewhere, and as Markdown with the same tables."""

from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined

from relufy.report.content import Section, Table

MOST_FIGURE = 28
"""Characters of the longest cell that is a figure."""
LONG_TEXT = 44


def environment() -> Environment:
    """Return the one set-up of templates: HTML is escaped, a missing value is an error."""
    return Environment(
        loader=PackageLoader("relufy.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def style() -> str:
    """Return the CSS of all reports."""
    return resources.files("relufy.report").joinpath("templates", "style.css").read_text()


def to_html(title: str, overview: Sequence[Table], sections: Sequence[Section]) -> str:
    """Return the page: an overview, a section for each result, and how each was made."""
    page = environment().get_template("report.html.jinja")
    return page.render(
        title=title, overview=overview, sections=sections, style=style(), is_text=is_text, is_wordy=is_wordy
    )


def to_markdown(title: str, overview: Sequence[Table], sections: Sequence[Section]) -> str:
    """Return the tables, notes, definitions and commands as Markdown; plots are in the HTML page."""
    lines = [f"# {title}", ""]
    for table in overview:
        lines += _table(table)
    for section in sections:
        lines += _section(section)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section) -> list[str]:
    lines = [f"## {_plain(section.title)}", ""]
    lines += [section.lead, ""] if section.lead else []
    for table in section.tables:
        lines += _table(table)
    lines += [f"- {_plain(note)}" for note in section.notes] + [""] * bool(section.notes)
    if section.figures:
        lines += [f"Plots in the HTML page: {', '.join(figure.title for figure in section.figures)}.", ""]
    lines += [f"- {name}: {_plain(meaning)}" for name, meaning in section.definitions.items()]
    lines += [""] * bool(section.definitions)
    if section.command:
        lines += ["```", section.command, "```", ""]
    versions = ", ".join(f"{name} {version}" for name, version in section.versions.items())
    return [*lines, f"{section.file}{': ' * bool(versions)}{versions}", ""]


def _table(table: Table) -> list[str]:
    if not table.rows:
        return []
    rule = [":---"] + ["---:"] * (len(table.columns) - 1)
    rows = [table.columns, rule, *table.rows]
    return [f"### {table.title}", "", *("| " + " | ".join(map(_cell, row)) + " |" for row in rows), ""]


def _cell(text: str) -> str:
    escaped = text.replace("|", "\\|").replace("<", "&lt;")
    return "<br>".join(map(_plain, escaped.splitlines()))


def _plain(text: str) -> str:
    return " ".join(str(text).split())


def is_text(table: Table, column: int) -> bool:
    """Tell whether a column holds words rather than figures: those wrap, and are set to the left."""
    cells = [row[column] for row in table.rows if column < len(row)]
    return column == 0 or any(len(cell) > MOST_FIGURE or cell.replace(" ", "").isalpha() for cell in cells)


def is_wordy(table: Table) -> bool:
    """Tell whether a table has long texts: on a phone its rows are set one cell below the other."""
    return any(len(cell) > LONG_TEXT for row in table.rows for cell in row)
