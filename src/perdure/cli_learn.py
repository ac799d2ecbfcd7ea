"""Commands that teach and measure. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from perdure.cli_common import (
    HERE,
    REFUSED,
    JsonOption,
    SetOption,
    WorkspaceOption,
    app,
    open_workspace,
    out,
    reporter,
)
from perdure.config import RunConfig, load_config, with_settings
from perdure.methods import AUTO, METHODS
from perdure.types import InputError

if TYPE_CHECKING:
    from perdure.workspace import Workspace

MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method", help="sdft, sft ... (docs/method.md), or auto, as check recommends; default: perdure.toml."
    ),
]


@app.command()
def demo(
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="Folder of the demo's own, new or of an earlier demo.")
    ] = Path("demo-workspace"),
    compare: Annotated[
        str | None, typer.Option("--compare", help="Also run the chain with this method, such as sft.")
    ] = None,
) -> None:
    """The embedded model learns three skills in a row.

    The report shows what it learned and kept."""
    from perdure.demo import run_demo
    from perdure.report.text import render

    summary, report = run_demo(workspace, compare, reporter())
    render(summary, out)
    out.print(f"\nReport: {report}", soft_wrap=True)


@app.command()
def init(
    workspace: Annotated[Path, typer.Argument(help="Folder to make.")],
    model: Annotated[
        str | None, typer.Option(help="embedded (the default), a folder, a GGUF file or a hub id.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings to begin with, as in perdure.toml: recipes/scale/...")
    ] = None,
    settings: SetOption = None,
) -> None:
    """Make a workspace whose champion is the base model."""
    from perdure.stages import create_workspace

    given = load_config(config) if config else RunConfig()
    if model not in (None, "embedded") and Path(model).expanduser().exists():  # later commands may run elsewhere
        model = str(Path(model).expanduser().absolute())
    source = [] if model is None else [f"model.source={json.dumps(model)}"]
    create_workspace(workspace, with_settings(given, [*source, *(settings or [])]))
    out.print(f"{workspace}: ready. Next, with a skill folder (perdure import makes one): perdure check SKILL -w "
              f"{workspace}", soft_wrap=True)  # fmt: skip


@app.command()
def check(
    skills: Annotated[list[Path], typer.Argument(help="Skill folders.")],
    workspace: WorkspaceOption = HERE,
    method: MethodOption = None,
    settings: SetOption = None,
    hardware: Annotated[
        str | None, typer.Option(help="Only the memory and time of a step there, by arithmetic: 1xH100-80GB.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Will this work, and what will it cost?

    Data, windows, teacher gap, the method to take. Exit code 1: not ready."""
    from perdure.curriculum import check_hardware, check_skills
    from perdure.report.check import hardware_tables, preflight_tables

    place, config = open_workspace(workspace, _with_method(settings, method))
    if hardware:
        found = check_hardware(place, skills, config, hardware)
        if as_json:
            out.print_json(json.dumps({"skills": found}))
        else:
            hardware_tables(found, out)
        raise typer.Exit(0 if all(result["fits"] for result in found) else REFUSED)
    results = check_skills(place, skills, config, reporter())
    if as_json:
        out.print_json(json.dumps({"skills": results}))
    else:
        preflight_tables(results, out)
    raise typer.Exit(0 if all(result["ready"] for result in results) else REFUSED)


@app.command()
def learn(
    skills: Annotated[list[Path], typer.Argument(help="Skill folders, taught in this order.")],
    workspace: WorkspaceOption = HERE,
    method: MethodOption = None,
    settings: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Train although the preflight sees no teacher gap.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin an unfinished stage anew.")] = False,
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="All six attempts to save a candidate that hurt something, or none; default: gate.repair.",
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Where each stage's training time went.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Teach skills, keep what it knew, or refuse.

    Preflight, train, evaluate everything, gate; promote, hold or refuse. Exit code 1: not all were promoted."""
    from perdure.curriculum import learn as learn_skills
    from perdure.report.html import write_report
    from perdure.report.numbers import summary
    from perdure.report.text import render

    if profile and as_json:
        raise InputError("--profile prints tables, --json one object: give one of them")
    repairs = [] if repair is None else [f"gate.repair={6 if repair else 0}"]
    place, config = open_workspace(workspace, [*repairs, *(_with_method(settings, method))])
    with place.lock():
        outcomes = learn_skills(place, skills, config, reporter(), force=force, restart=restart)
        report = write_report(place.folder)
    if as_json:
        told = {"skills": [asdict(outcome) for outcome in outcomes], "report": str(report)}
        out.print_json(json.dumps(told | place.aliases()))
    else:
        render(summary(place.folder), out)
        if profile:
            _profile(place, config, [outcome.stage for outcome in outcomes])
        for outcome in outcomes:
            if outcome.decision != "promoted":
                out.print(Text(f"{outcome.skill} was {outcome.decision}: {' '.join(outcome.reasons)}"), soft_wrap=True)
        out.print(f"\nReport: {report}", soft_wrap=True)
    raise typer.Exit(0 if all(outcome.decision == "promoted" for outcome in outcomes) else REFUSED)


def _with_method(settings: list[str] | None, method: str | None) -> list[str]:
    """``--set`` with ``--method`` in front. Raises InputError for a method that is none."""
    if method and method not in (*METHODS, AUTO):
        raise InputError(f"--method {method}: one of {', '.join((*METHODS, AUTO))}")
    return [*([f'train.method="{method}"'] if method else []), *(settings or [])]


def _profile(place: Workspace, config: RunConfig, stages: list[str]) -> None:
    from perdure.models import compute_dtype, device_of, matmul_peak
    from perdure.report.profile import profile
    from perdure.report.text import profile_table

    peak = matmul_peak(compute_dtype(config.model), device_of(config.model))
    for stage in stages:
        profile_table(stage, profile(place.run_folder(stage), peak), peak, out)


@app.command("eval")
def evaluate(
    workspace: WorkspaceOption = HERE,
    version: Annotated[str, typer.Option(help="v3, champion, previous or candidate.")] = "champion",
    skill: Annotated[
        list[Path] | None, typer.Option("--skill", metavar="SKILL", help="Skill folder; default: all taught ones.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Prior capabilities as well.")] = False,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a version on skills and prior capabilities."""
    from perdure.curriculum import evaluate_version
    from perdure.report.text import score_table

    place, config = open_workspace(workspace, settings)
    result = evaluate_version(place, version, skill or [], config, probe, reporter())
    if as_json:
        out.print_json(json.dumps(result))
    else:
        score_table(result, out)
