"""The command line: one file for each verb, which parses, calls and prints.

Exit codes: 0 success, 2 a mistake of the user's (one clear message), 1 a defect of ours, 130 interrupted.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from paqdetr._threads import postpone_compiler
from paqdetr.cli import (
    analyze,
    bench,
    convert,
    data,
    evaluate,
    export,
    hub,
    info,
    models,
    plan,
    predict,
    serve,
    study,
    train,
)
from paqdetr.cli.console import Ended, errors, finish_streams, make_streams_lossy, print_styled, results
from paqdetr.cli.habits import what_to_type
from paqdetr.cli.help import Verb, Verbs, show_help
from paqdetr.errors import UserError, memory_error

# At import, which processes that are spawned repeat, and no torchvision is loaded yet.
postpone_compiler()


class _AllVerbs(Verbs):
    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return [name for verbs in _HEADINGS.values() for name in verbs]


app = typer.Typer(
    name="paqdetr",
    cls=_AllVerbs,
    help="Train, evaluate and use DETR-family detectors with PaQ's pattern queries.",
    epilog="`paqdetr VERB --help` shows how a verb is used; --debug shows tracebacks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from paqdetr._version import __version__
    from paqdetr.environment import require_device

    results.print(f"paqdetr {__version__}\nPython {platform.python_version()}\ntorch {torch.__version__}")
    for package in ("torchvision", "numba"):
        try:
            results.print(f"{package} {version(package)}")
        except PackageNotFoundError:
            results.print(f"{package} not installed")
    device = require_device(None)
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    results.print(f"device {device}{name}")
    raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions that matter, and the device that is used.",
        ),
    ] = False,
) -> None:
    """Options before the verb; each does its work in its own callback."""


_HEADINGS = {
    "Data": {"data": data.app},
    "Train": {"train": train.train, "plan": plan.plan, "study": study.study},
    "Measure": {"eval": evaluate.evaluate, "analyze": analyze.analyze, "bench": bench.bench},
    "Use": {"predict": predict.predict, "export": export.export, "serve": serve.serve},
    "Exchange": {"convert": convert.convert, "hub": hub.app},
    "Look up": {"models": models.models, "config": models.config, "info": info.info, "help": show_help},
}
for _heading, _verbs in _HEADINGS.items():
    for _name, _verb in _verbs.items():
        if isinstance(_verb, typer.Typer):
            for _command in _verb.registered_commands:
                _command.cls = Verb
            app.add_typer(_verb, name=_name, cls=Verbs, rich_help_panel=_heading)
        else:
            app.command(_name, cls=Verb, rich_help_panel=_heading)(_verb)


_command_of = functools.cache(typer.main.get_command)  # all verbs and options: 40 ms

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
    program = _command_of(app)
    try:
        if (mistake := what_to_type(arguments, program)) is not None:
            return _mistake(*mistake, debug=debug)
        code = program.main(arguments, prog_name="paqdetr", standalone_mode=False)
        if code == 130:  # typer has caught Ctrl-C itself
            return _interrupted(training)
        return code if isinstance(code, int) else 0
    except Ended as ended:
        return ended.code
    except UserError as error:
        if error.reported_elsewhere:  # by another of several processes
            return 2
        return _mistake(error.message, error.remedy, debug=debug)
    except Exception as error:
        # typer may carry a copy of click: know its errors by this
        usage = getattr(error, "format_message", None)
        if type(error).__name__ == "NoArgsIsHelpError" and usage is not None:
            typer.echo(usage(), err=True)
            return 2
        if usage is not None:
            return _mistake(usage(), f"`{_verb_of(arguments, program)} --help` shows how it is used", debug=debug)
        if type(error).__name__ == "Exit":
            return int(getattr(error, "exit_code", 0))
        if type(error).__name__ == "Abort":
            return _interrupted(training)
        # A full disk, a folder that may not be written...
        if isinstance(error, OSError) and error.filename is not None:
            return _mistake(
                f"{error.filename}: {error.strerror}", "check the path, its permissions and the disk", debug=debug
            )
        if isinstance(error, OSError) and "temporary directory" in str(error):
            return _mistake(
                f"there is no writable folder for temporary files: {error.strerror or error}",
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


def _verb_of(arguments: Sequence[str], program: Any) -> str:
    """The verb of a command line, such as "paqdetr data make"; not every usage error knows it."""
    names, command = ["paqdetr"], program
    for word in arguments:
        if (command := getattr(command, "commands", {}).get(word)) is None:
            break
        names.append(word)
    return " ".join(names)


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
