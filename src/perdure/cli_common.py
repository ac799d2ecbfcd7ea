"""What all commands share: the application, its consoles, options and exit codes."""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from perdure.config import RunConfig, with_settings
from perdure.types import InputError

if TYPE_CHECKING:
    from perdure.workspace import Workspace

REFUSED, BAD_INPUT, INTERRUPTED = 1, 2, 3

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="One language model learns skill after skill from demonstrations and keeps what it knew.",
)
out = Console(highlight=False, markup=False)
"""Results."""
err = Console(stderr=True, highlight=False, markup=False)
"""Progress and errors."""

WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", "-w", envvar="PERDURE_WORKSPACE", help="Workspace folder.")
]
WorkspaceArgument = Annotated[
    Path | None, typer.Argument(help="Workspace folder; default: $PERDURE_WORKSPACE, or the folder here.")
]
SameOption = Annotated[Path | None, typer.Option("--workspace", "-w", help="The same, as other commands take it.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting as in perdure.toml: train.steps=80")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
HERE = Path(".")


def reporter() -> Any:
    from perdure.progress import ConsoleReporter

    return ConsoleReporter(err)


def actor() -> str:
    """Who runs the command, as this machine knows them: for the ledger."""
    try:
        name = getpass.getuser()
    except OSError:  # a user without a name, as in a container
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"


def the_one(workspace: Path | None, same: Path | None) -> Path:
    """The folder that was named, as an argument or by -w, or else in the environment. Raises InputError where both name
    one, and not the same."""
    if workspace and same and workspace != same:
        raise InputError(f"two folders are named, {workspace} and {same}: give one")
    return workspace or same or Path(os.environ.get("PERDURE_WORKSPACE") or HERE)


def open_place(folder: Path) -> Workspace:
    """A workspace without its settings: what is served can be seen and changed whatever perdure.toml says."""
    from perdure.workspace import Workspace

    return Workspace.open(folder)


def open_workspace(folder: Path, settings: list[str] | None) -> tuple[Workspace, RunConfig]:
    place = open_place(folder)
    return place, with_settings(place.config(), settings or [])
