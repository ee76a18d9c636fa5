"""`relufy info`: what a model or a packed file is, and what can be done with it."""

from collections.abc import Iterator, Mapping
from typing import Any

from relufy.cli.options import Json, ModelOrFile
from relufy.cli.output import print_json, result
from relufy.errors import UserError

SITES_NEED = 'the sites need torch and transformers: pip install "relufy[train]"'


def command(model: ModelOrFile, json: Json = False) -> None:
    """Say what a model is: its shape, its sites and sparsifiers, and whether the engine runs it."""
    import relufy

    found = relufy.info(model)
    sites = _sites(model) if found["kind"] == "checkpoint" else None
    if json:
        print_json(found | ({"sites": sites} if sites else {}))
        return
    for line in (*lines_of(found), *(_site_lines(sites) if sites else ())):
        result(line)


def lines_of(document: Any, indent: str = "") -> list[str]:
    """Return nested plain data as indented `key: value` lines; what is empty is left out."""
    lines = []
    for key, value in document.items():
        if value is None or value in ([], {}):
            continue
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *lines_of(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            items = (", ".join(f"{k}: {_words(v)}" for k, v in item.items()) for item in value)
            lines += [f"{indent}{key}:", *(f"{indent}  - {item}" for item in items)]
        else:
            lines.append(f"{indent}{key}: {_words(value)}")
    return lines


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _sites(model: str) -> dict[str, Any]:
    """Return the table of the sites, or the reason why there is none under "refusal"."""
    try:
        from relufy.cli.quiet import quiet_libraries
        from relufy.model.site_table import site_table

        quiet_libraries()
        return site_table(model).to_dict()
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "transformers"):
            raise
        return {"refusal": SITES_NEED}
    except UserError as error:
        return {"refusal": str(error)}


def _site_lines(sites: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table, the neurons, the parts and the notes as lines of text."""
    if sites["refusal"]:
        yield f"sites: none; {sites['refusal']}"
    if not sites.get("rows"):
        return
    stack = _common_stack([row["module"] for row in sites["rows"]])
    megabytes = f"MB in {sites['dtype']}"
    header = ["site", "module", "shape", "number", "of blocks", "of model", megabytes, "input from"]
    lines = [header, *(_row(row, stack) for row in sites["rows"])]
    if sites["refusal"]:
        lines = [line[1:-1] for line in lines]
    yield f"{'weights' if sites['refusal'] else 'sites'}{f' in {stack}' * bool(stack)}:"
    yield from _columns(lines)
    for neuron in sites["neurons"]:
        where = f"{neuron['module'].removeprefix(f'{stack}.')} ({neuron['activation']})"
        yield f"  neuron: {neuron['width']} in each of {neuron['blocks']} blocks, {where}"
    yield from (f"  note: {text}" for text in sites["notes"])
    yield "parts:"
    yield from _columns([["part", "parameters", "of model", megabytes], *map(_part, sites["parts"])])


def _columns(rows: list[list[str]]) -> Iterator[str]:
    """Yield the rows as aligned lines: words to the left, what begins with a digit to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    is_number = [rows[-1][index][:1].isdigit() for index in range(len(widths))]
    for row in rows:
        cells = zip(row, widths, is_number, strict=True)
        yield (
            "  " + "  ".join(f"{cell:>{w}}" if right else f"{cell:<{w}}" for cell, w, right in cells).rstrip()
        )


def _common_stack(modules: list[str]) -> str:
    """Return what all names have up to the number of the block, or nothing."""
    stacks = {module.partition(".*.")[0] for module in modules}
    return f"{stacks.pop()}.*" if len(stacks) == 1 else ""


def _row(row: Mapping[str, Any], stack: str) -> list[str]:
    return [
        " ".join(row["sites"]),
        row["module"].removeprefix(f"{stack}."),
        "x".join(map(str, row["shape"])),
        str(row["modules"]),
        f"{row['share_of_blocks']:.1%}",
        f"{row['share_of_model']:.1%}",
        f"{row['bytes'] / 1e6:.2f}",
        (row["input"] or "no norm").removeprefix(f"{stack}."),
    ]


def _part(part: Mapping[str, Any]) -> list[str]:
    numbers = [f"{part['parameters']:,}", f"{part['share_of_model']:.1%}", f"{part['bytes'] / 1e6:.2f}"]
    return [part["name"], *numbers]
