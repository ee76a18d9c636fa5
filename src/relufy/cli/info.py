"""`relufy info`: what a model or a packed file is, and what can be done with it."""

from typing import Any

from relufy.cli.options import Json, ModelOrFile
from relufy.cli.output import print_json, result


def command(model: ModelOrFile, json: Json = False) -> None:
    """Say what a model is: its shape, its sites and sparsifiers, and whether the engine runs it."""
    import relufy

    found = relufy.info(model)
    if json:
        print_json(found)
    else:
        for line in lines_of(found):
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
