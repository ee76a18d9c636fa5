"""How the demo tells what it does, without knowing who shows it."""

from typing import Protocol


class Watch(Protocol):
    """Who looks on: the command line shows it, a test may ignore it."""

    def step(self, title: str, command: str | None = None) -> None:
        """A step begins; `command` does it alone."""
        ...

    def say(self, text: str) -> None:
        """One line worth knowing."""
        ...

    def progress(self, task: str, done: int, total: int, detail: str = "") -> None:
        """A long task moved."""
        ...


class Silent:
    """A watch that shows nothing."""

    def step(self, title: str, command: str | None = None) -> None:
        return

    def say(self, text: str) -> None:
        return

    def progress(self, task: str, done: int, total: int, detail: str = "") -> None:
        return
