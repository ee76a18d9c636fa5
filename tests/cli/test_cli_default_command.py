"""A command with subcommands that is a command itself: the first word decides which is meant."""

from typing import Annotated

import pytest
import typer

from relufy.cli.default_command import DefaultCommand

app = typer.Typer()
group = typer.Typer(cls=DefaultCommand, invoke_without_command=True)
app.add_typer(group, name="measure")


@app.command()
def other() -> None:
    """Stand beside the group."""


@group.callback()
def measure(model: str, text: Annotated[list[str], typer.Option()], json: bool = False) -> None:
    """Measure a model."""
    typer.echo(f"{model} {' '.join(text)} {json}")


@group.command("reuse")
def reuse(model: str, window: int = 3) -> None:
    """Measure reuse."""
    typer.echo(f"reuse of {model} {window}")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    app(list(arguments), standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bundled", "--text", "a"], "bundled a False"),
        (["--text", "a", "--text", "b", "bundled", "--json"], "bundled a b True"),
        (["./reuse", "--text", "a"], "./reuse a False"),
        (["reuse", "bundled"], "reuse of bundled 3"),
        (["reuse", "--window", "4", "reuse"], "reuse of reuse 4"),
    ],
    ids=" ".join,
)
def test_the_first_word_decides(arguments, expected, capsys) -> None:
    assert said(capsys, "measure", *arguments).strip() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bundled"], "text"),
        (["bundled", "--text", "a", "more"], "more"),
        (["bundled", "--nonsense"], "nonsense"),
        (["reuse"], "model"),
        ([], "model"),
    ],
    ids=" ".join,
)
def test_what_is_missing_or_too_much_is_said(arguments, message) -> None:
    with pytest.raises(typer.exceptions.TyperException) as caught:
        app(["measure", *arguments], standalone_mode=False)
    assert message in caught.value.format_message()


def test_the_help_shows_both(capsys) -> None:
    shown = said(capsys, "measure", "--help")
    assert all(word in shown for word in ("Measure a model.", "--text", "reuse", "Measure reuse."))
    own = said(capsys, "measure", "reuse", "--help")
    assert "Measure reuse." in own and "measure reuse [OPTIONS]" in own
