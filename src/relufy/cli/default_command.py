"""A command that has subcommands and is a command itself: `relufy measure MODEL` and `relufy measure reuse`.

Its own arguments and options are those of the app's callback. The first word decides: the name of a
subcommand is one, everything else belongs to the command itself (`./reuse` is a folder called like one).
"""

from typing import Any

from typer import Context
from typer.core import TyperGroup


class DefaultCommand(TyperGroup):
    """Use as `app = typer.Typer(cls=DefaultCommand, invoke_without_command=True)` with `app.callback()`."""

    allow_extra_args = False
    allow_interspersed_args = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] in self.commands:
            ctx._protected_args, ctx.args = args[:1], args[1:]
            return ctx.args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if not ctx._protected_args:
            return super().invoke(ctx)
        name, arguments = ctx._protected_args[0], ctx.args
        ctx.invoked_subcommand = name
        with ctx, self.commands[name].make_context(name, arguments, parent=ctx) as context:
            return context.command.invoke(context)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's own parameters; of a subcommand's context none, which it does not take."""
        return super().get_params(ctx) if ctx.command is self else []

    def collect_usage_pieces(self, ctx: Context) -> list[str]:  # type: ignore[override]
        pieces = super().collect_usage_pieces(ctx)
        return pieces[:-1] if not self.commands else [*pieces[:-1], "|", pieces[-1]]
