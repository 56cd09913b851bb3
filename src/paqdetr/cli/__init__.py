"""The command line: one file for each verb, which parses, calls and prints.

Exit codes: 0 success, 2 a mistake of the user's (one clear message), 1 a defect of ours, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from paqdetr.cli import (
    analyze,
    bench,
    config,
    convert,
    data,
    evaluate,
    export,
    hub,
    models,
    plan,
    predict,
    serve,
    study,
    train,
    version,
)
from paqdetr.cli.console import Ended, errors, finish_streams, make_streams_lossy, print_styled
from paqdetr.errors import UserError, memory_error

app = typer.Typer(
    name="paqdetr",
    help="Train, evaluate and use DETR-family detectors with PaQ's pattern queries. --debug shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.callback()(version.options)
app.command("train")(train.train)
app.command("plan")(plan.plan)
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("serve")(serve.serve)
app.command("export")(export.export)
app.command("analyze")(analyze.analyze)
app.command("convert")(convert.convert)
app.command("models")(models.models)
app.command("bench")(bench.bench)
app.command("study")(study.study)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.add_typer(hub.app, name="hub")


# What a disk says that is full, may not be written, or fails.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program and exit. What cannot be printed is dropped, which is an error only where a verb has no other result."""
    arguments = sys.argv[1:] if argv is None else argv
    os.environ["MPLBACKEND"] = "agg"  # no window is opened, and the user's choice may not be installed here
    make_streams_lossy()
    code = run(arguments)
    lost = finish_streams()
    if lost is not None and code == 0 and not _trains(arguments):
        code = _mistake(f"standard output: {lost}", "make room, or write to another place", debug=False)
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Run the program.

    Returns:
        the exit code.
    """
    debug, training = "--debug" in argv, _trains(argv)
    arguments = [argument for argument in argv if argument != "--debug"]
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="paqdetr", standalone_mode=False)
        if code == 130:  # typer has caught Ctrl-C itself
            return _interrupted(training)
        return code if isinstance(code, int) else 0
    except Ended as ended:
        return ended.code
    except UserError as error:
        if error.told_elsewhere:  # by another of several processes
            return 2
        return _mistake(error.message, error.remedy, debug=debug)
    except Exception as error:
        # typer may carry a copy of click: know its errors by this
        usage = getattr(error, "format_message", None)
        if type(error).__name__ == "NoArgsIsHelpError" and usage is not None:
            errors.print(usage())
            return 2
        if usage is not None:
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else "paqdetr"
            return _mistake(usage(), f"`{path} --help` shows how it is used", debug=debug)
        if type(error).__name__ == "Exit":
            return int(getattr(error, "exit_code", 0))
        if type(error).__name__ == "Abort":
            return _interrupted(training)
        # A full disk, a folder that may not be written...
        if isinstance(error, OSError) and error.filename is not None:
            return _mistake(
                f"{error.filename}: {error.strerror}", "check the path, its permissions and the disk", debug=debug
            )
        if isinstance(error, OSError) and "No usable temporary directory" in str(error):
            return _mistake(
                f"there is no writable folder for temporary files: {error.strerror}",
                "set the environment variable TMPDIR to a folder with some room",
                debug=debug,
            )
        if isinstance(error, OSError) and error.errno in _DISK:  # of a write, which does not name its file
            return _mistake(f"a file cannot be written ({error.strerror})", "look at the disk", debug=debug)
        if (full := memory_error(error)) is not None:
            return _mistake(full.message, full.remedy, debug=debug)
        if debug:
            traceback.print_exc()
        print_styled(errors, ("internal error:", "bold red"), f" {type(error).__name__}: {error}")
        print_styled(errors, ("help:", "bold"), " this is a defect of paqdetr; report it with the output of --debug")
        return 1
    except KeyboardInterrupt:
        return _interrupted(training)


def _trains(argv: Sequence[str]) -> bool:
    return next((word for word in argv if not word.startswith("-")), "") in ("train", "study")


def _mistake(message: str, remedy: str, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" process {rank}:"
    print_styled(errors, ("error:", "bold red"), f"{where} {message}")
    print_styled(errors, ("help:", "bold"), f" {remedy}")
    return 2


def _interrupted(training: bool) -> int:
    how = " what was saved last goes on with --resume" if training else " nothing was finished"
    print_styled(errors, ("interrupted:", "bold"), how)
    return 130
