"""Help in groups: verbs and options under headings, as plain text that fits a terminal of 80 columns."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from paqdetr.errors import ConfigError
from paqdetr.text import did_you_mean

_MANY = 10  # options and arguments of a verb, from which on they stand under headings
# How typer writes types -> the usual words.
_TYPES = {"<path>": "PATH", "<str>": "TEXT", "<int>": "N", "<int range>": "N", "<float>": "X", "<float range>": "X"}


def _write_sections(formatter: Any, rows: list[tuple[str, tuple[str, str]]]) -> None:
    """Rows of (heading, (name, text)), those of a heading together; "Options" last."""
    for heading in sorted(dict.fromkeys(heading for heading, _ in rows), key=lambda heading: heading == "Options"):
        with formatter.section(typer.style(heading, bold=True)):
            formatter.write_dl([row for own, row in rows if own == heading])


class Verb(TyperCommand):
    """A verb whose options stand under headings if they are many: each has its own as `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows = []
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is None:
                continue
            name, text = record
            heading = (len(self.params) >= _MANY and getattr(param, "rich_help_panel", None)) or "Options"
            if param.param_type_name == "argument":
                heading, name = "Arguments", name.partition(" <")[0]
            name = re.sub("<[^>]+>", lambda found: _TYPES.get(found[0], found[0]), name)
            rows.append((heading, (name, text)))
        _write_sections(formatter, rows)


class Verbs(TyperGroup):
    """A group of verbs, each under the heading of its `rich_help_panel`, with the whole first sentence of its help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows = []
        for name in self.list_commands(ctx):
            command = self.commands[name]
            heading = getattr(command, "rich_help_panel", None) or "Verbs"
            rows.append((heading, (name, command.get_short_help_str(200))))
        _write_sections(formatter, rows)
        Verb.format_options(self, ctx, formatter)  # type: ignore[arg-type]


def _find_command(context: Any, words: list[str]) -> Any:
    """The context of a verb, such as ["data", "make"], below that of the program.

    Raises:
        ConfigError: there is no such verb.
    """
    for word in words:
        known = getattr(context.command, "commands", {})
        if word not in known:
            raise ConfigError(
                f"`{context.command_path}` has no verb {word!r}",
                did_you_mean(word, list(known), f"`{context.command_path} --help` lists what there is"),
            )
        context = typer.Context(known[word], info_name=word, parent=context)
    return context


def show_help(
    ctx: typer.Context, words: Annotated[list[str] | None, typer.Argument(metavar="VERB", help="Such as train.")] = None
) -> None:
    """Show how a verb is used: the same as VERB --help."""
    found = _find_command(ctx.find_root(), words or [])
    typer.echo(found.get_help())
