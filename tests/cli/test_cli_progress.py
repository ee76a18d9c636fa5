"""Progress away from a terminal: plain lines, few of them, always the last."""

import io

from rich.console import Console

from relufy.cli.progress import ProgressDisplay


def lines(updates: list[tuple[int, int]], terminal: bool = False) -> list[str]:
    stream = io.StringIO()
    with ProgressDisplay(Console(file=stream, force_terminal=terminal, width=120)) as display:
        for done, total in updates:
            display.update("training", done, total, "loss 0.5")
    return stream.getvalue().splitlines()


def test_first_and_last_are_printed() -> None:
    printed = lines([(done, 100) for done in range(1, 101)])
    assert len(printed) == 2
    assert printed[0].startswith("training: 1/100") and printed[-1] == "training: 100/100  loss 0.5"


def test_a_terminal_gets_a_bar() -> None:
    assert any("100/100" in line for line in lines([(1, 100), (100, 100)], terminal=True))
