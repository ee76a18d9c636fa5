"""What a report is made of: sections of tables and figures, the same for HTML and Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """A titled table of words; the first column names the row, the others hold figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A plot as an <svg> element. `wide` ones scroll on a phone instead of shrinking."""

    title: str
    svg: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """What one result says."""

    title: str
    lead: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    definitions: Mapping[str, str] = field(default_factory=dict)
    file: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


def share(value: float | None, digits: int = 1) -> str:
    """Return a share in percent, or a dash for none."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number, or a dash for none."""
    return "-" if value is None else f"{value:,.{digits if abs(value) < 1000 else 0}f}"


def with_error(value: float | None, error: float | None, digits: int = 2) -> str:
    """Return a number with its standard error where there is one."""
    if value is None:
        return "-"
    if error is None:
        return number(value, digits)
    digits = digits if abs(value) < 1000 else 0
    return f"{value:,.{digits}f} \u00b1 {error:,.{digits}f}"
