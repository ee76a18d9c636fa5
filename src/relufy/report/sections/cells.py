"""Values of a document as the cells of a table, where the columns are not known beforehand."""

from collections.abc import Mapping
from typing import Any


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a row without mappings inside: their keys follow that of the mapping; lists are left out."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            found |= flat(value, f"{name} ")
        elif not isinstance(value, list):
            found[name] = value
    return found


def cell(value: Any) -> str:
    """Return a value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
