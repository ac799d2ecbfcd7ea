"""The command line: the only place that wires things together. Every expected failure becomes one clear message."""

from __future__ import annotations

import errno
import signal
import sys
from typing import Annotated

import typer
from rich.text import Text

from perdure import __version__, cli_bench, cli_learn, cli_versions
from perdure.cli_common import BAD_INPUT, INTERRUPTED, app, err, out
from perdure.types import InputError

COMMANDS = (cli_learn, cli_versions, cli_bench)
"""Importing them has registered their commands, in this order."""
_BY_SIGNAL = 130
"""What typer exits with when Ctrl-C reaches it."""
_PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)


def main() -> None:
    """Run the command line; every expected failure becomes one clear message and its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except InputError as error:
        _fail(str(error), BAD_INPUT)
    except OSError as error:
        if error.errno not in _PLACE_ERRORS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror}. Nothing was half-written; make room or choose another place, then repeat the "
              "command.", BAD_INPUT)  # fmt: skip
    except SystemExit as stop:
        if stop.code != _BY_SIGNAL:
            raise
        _fail("interrupted. What was finished is kept; the same command goes on from there.", INTERRUPTED)


def _fail(message: str, code: int) -> None:
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
