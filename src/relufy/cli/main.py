"""The `relufy` command: its subcommands, and how errors leave the program.

Exit codes: 0 done, 2 refused input (one line on stderr), 130 stopped by Ctrl-C.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from relufy.cli import (
    bench,
    cache,
    chat,
    compare,
    demo,
    doctor,
    finetune,
    generate,
    info,
    measure,
    pack,
    predictor,
    pretrain,
    recipes,
    report,
    sparsify,
    verify,
)
from relufy.cli import eval as evaluation
from relufy.errors import UserError

EXTRA_OF = dict.fromkeys(("torch", "transformers", "accelerate", "datasets", "peft"), "train") | {
    "matplotlib": "report",
    "llama_cpp": "bench",
    "gguf": "bench",
    "lm_eval": "eval",
    "scipy": "eval",
}
"""The extra of relufy that brings a package."""

app = typer.Typer(
    help="Make language models activation-sparse, and turn the zeros into speed.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo,
    recipes,
    sparsify,
    finetune,
    pretrain,
    predictor,
    doctor,
    evaluation,
    compare,
    report,
    info,
    pack,
    verify,
    generate,
    chat,
):
    app.command(command.__name__.rpartition(".")[2])(command.command)
app.add_typer(measure.app, name="measure")
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        import relufy

        typer.echo(f"relufy {relufy.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def relufy(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave the program with its exit code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        code: Any = app(arguments, prog_name="relufy", standalone_mode=False)
    except UserError as error:
        return _refuse(str(error))
    except TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "relufy"
        return _refuse(f"{error.format_message()} (see {path} --help)")
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        return _refuse(f'this needs {package}: pip install "relufy[{EXTRA_OF[package]}]"')
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on; exit quietly
        return 141
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{place}{error.strerror or error}")
    return code if isinstance(code, int) else 0


def _refuse(message: str) -> int:
    if os.environ.get("RANK", "0") == "0":  # of many processes one speaks
        sys.stderr.write(f"relufy: {' '.join(message.split())}\n")
    return 2
