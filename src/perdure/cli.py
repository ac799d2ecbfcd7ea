"""The command line: the only place that wires things together. Every expected failure becomes one clear message."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
import traceback
from typing import Annotated, NoReturn

import typer
from rich.text import Text

from perdure import __version__, cli_bench, cli_changes, cli_import, cli_learn, cli_versions
from perdure.cli_common import BAD_INPUT, INTERRUPTED, app, err, out
from perdure.reporting import out_of_memory
from perdure.types import InputError

COMMANDS = (cli_import, cli_learn, cli_versions, cli_changes, cli_bench)
"""Importing them has registered their commands."""
ORDER = ("demo", "init", "import", "check", "learn", "eval", "status", "report", "log", "show", "diff", "chat",
         "promote", "rollback", "prune", "forget", "erase", "verify", "export", "sync", "bench")  # fmt: skip
"""As --help lists them: in the order of their first use."""
app.registered_commands.sort(key=lambda command: ORDER.index(command.name or getattr(command.callback, "__name__", "")))
_BY_SIGNAL = 130
"""What typer exits with when Ctrl-C reaches it."""
FAULT = 4
"""Exit code of a fault of Perdure's own: 1 would be taken for a verdict."""
_PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
"""No room, or no right to write: another attempt may do."""
_ELSEWHERE = "Nothing was half-written; make room or choose another place, then repeat the command."
_PATH_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""A path that cannot be what it is given as."""


def main() -> None:
    """Run the command line; every expected failure becomes one clear message and its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal in an old encoding gets "?" for what it cannot show
            stream.reconfigure(errors="replace")
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _one_of_several()
        else:
            app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)  # a process that follows; the lead says it
    except InputError as error:
        _fail(str(error), BAD_INPUT)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno in _PATH_ERRORS:
            _fail(f"{place}{error.strerror}; name another path", BAD_INPUT)
        if error.errno not in _PLACE_ERRORS:
            _fault()
        _fail(f"{place}{error.strerror}. {_ELSEWHERE}", BAD_INPUT)
    except Exception as error:
        if not (expected := _of_a_library(error)):
            _fault()
        _fail(expected, BAD_INPUT)
    except SystemExit as stop:
        if stop.code != _BY_SIGNAL:
            raise
        _fail("interrupted. What was finished is kept; the same command goes on from there.", INTERRUPTED)


def _of_a_library(error: Exception) -> str:
    """What to say of a failure that is the machine's and that a library gives as an error of its own: no memory, or no
    room on the disk. Empty for any other."""
    first = str(error).split("\n")[0]
    if out_of_memory(error):
        said = f" ({first.rstrip('.')})" if first else ""
        return (f"out of memory{said}. What was finished is kept. Repeat the command with smaller "
                "passes (--set train.micro_batch_tokens=1024 --set eval.batch_tokens=2048), with --set "
                "train.activation_checkpointing=true, or, for a stage that is begun anew, with adapters (--set "
                "train.lora_rank=16 --set train.learning_rate=1e-3); perdure check SKILL --hardware 1xA10-24GB says "
                "what a stage takes.")  # fmt: skip
    code = re.search(r"\(os error (\d+)\)", first) if type(error).__name__ == "SafetensorError" else None
    if code and int(code[1]) in _PLACE_ERRORS:
        return f"weights cannot be written: {os.strerror(int(code[1]))}. {_ELSEWHERE}"
    return ""


def _fault() -> NoReturn:
    """A fault of ours ends with its traceback, but not with the exit code of a verdict."""
    traceback.print_exc()
    sys.exit(FAULT)


def _one_of_several() -> None:
    """Started by torchrun or accelerate: the first process runs the command, the others take their part in it."""
    from perdure import processes, running  # noqa: F401  # importing it registers what the others are called for

    processes.start()
    if not processes.GROUP.lead:
        try:
            processes.follow()
        except processes.ProcessLost:
            sys.exit(INTERRUPTED)  # the lead says why it stopped
        return
    try:
        app()
    except processes.ProcessLost as error:
        _fail(str(error), INTERRUPTED)
    except SystemExit as stop:
        if stop.code != _BY_SIGNAL:
            processes.stop()
        raise
    except InputError:
        processes.stop()
        raise


def _fail(message: str, code: int) -> NoReturn:
    from perdure.report.text import safe_text

    err.print(Text("error: ", style="bold red").append(safe_text(message), style="default"), soft_wrap=True)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"perdure {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which one.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
