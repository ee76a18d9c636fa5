"""Writes a study's figures: a small JSON file of its results, its plot, its tables, also in its document.

    python -m studies.report activations WORK -o docs/studies

`WORK` is where the jobs ran, or what was written so: `docs/studies` repeats the tables and plots.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from studies.runner import finished
from studies.summary import short

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
"""Where a document has its tables."""


def write(study: str, work: Path, output: Path) -> Path:
    """Write the study's files to a folder of its name; return it."""
    folder = output / study
    kept = work / study / "results.json"
    if kept.is_file():
        results: dict[str, Any] = json.loads(kept.read_text())
    else:
        module = import_module(f"studies.{study}")
        results = {
            name: short(found) for name, found in sorted(finished(work).items()) if module.is_part(name)
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    module = import_module(f"studies.{study}")
    tables = module.tables(results)
    (folder / "tables.md").write_text(tables)
    module.draw(results, folder / "plot.png")
    document = output / f"{study}.md"
    if document.is_file():
        document.write_text(with_tables(document.read_text(), tables))
    return folder


def with_tables(document: str, tables: str) -> str:
    """Return the document with these tables between its marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def main() -> None:
    """Write the files of the study named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study")
    parser.add_argument("work", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    print(write(options.study, options.work, options.output))


if __name__ == "__main__":
    main()
