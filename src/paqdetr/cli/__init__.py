"""The command line: one file for each verb, which parses, calls and prints.

Exit codes: 0 success, 2 a mistake of the user's (one clear message), 1 a defect of ours, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

# Before torch starts its threads: idle ones that spin without end slow a busy machine down several times.
os.environ.setdefault("GOMP_SPINCOUNT", "300000")

from paqdetr.cli import config, data, evaluate, models, predict, train
from paqdetr.cli.console import errors
from paqdetr.errors import UserError

app = typer.Typer(
    name="paqdetr",
    help="Train, evaluate and use DETR-family detectors with PaQ's pattern queries. --debug shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("models")(models.models)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program and exit."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run the program.

    Returns:
        the exit code.
    """
    debug = "--debug" in argv
    arguments = [argument for argument in argv if argument != "--debug"]
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="paqdetr", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        if debug:
            raise
        errors.print(f"[bold red]error:[/] {_escape(error.message)}", soft_wrap=True)
        errors.print(f"[bold]help:[/] {_escape(error.remedy)}", soft_wrap=True)
        return 2
    except Exception as error:
        usage = getattr(
            error, "format_message", None
        )  # typer may carry a copy of click: know its errors by this
        if type(error).__name__ == "NoArgsIsHelpError" and usage is not None:
            errors.print(_escape(usage()), soft_wrap=True)
            return 2
        if usage is not None:
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else "paqdetr"
            errors.print(f"[bold red]error:[/] {_escape(usage())}", soft_wrap=True)
            errors.print(f"[bold]help:[/] `{path} --help` shows how it is used", soft_wrap=True)
            return 2
        if type(error).__name__ == "Exit":
            return int(getattr(error, "exit_code", 0))
        if type(error).__name__ == "Abort":
            return _interrupted()
        if debug:
            raise
        errors.print(
            f"[bold red]internal error:[/] {type(error).__name__}: {_escape(str(error))}", soft_wrap=True
        )
        errors.print(
            "[bold]help:[/] this is a defect of paqdetr; report it with the output of --debug", soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        return _interrupted()


def _interrupted() -> int:
    errors.print("[bold]interrupted:[/] a training goes on from its last whole epoch with --resume")
    return 130


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
