"""Commands that teach and measure. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
from perdure.config import GateConfig, RunConfig, load_config, with_settings
from perdure.methods import AUTO, METHODS
from perdure.types import InputError

if TYPE_CHECKING:
    from perdure.importers.docs import Questions
    from perdure.session import Session
    from perdure.workspace import Workspace


@app.command()
def demo(
    workspace: WorkspaceOption = Path("demo-workspace"),
    compare: Annotated[
        str | None, typer.Option("--compare", help="Also run the chain with this method, such as sft.")
    ] = None,
) -> None:
    """The embedded model learns three real skills in a row.

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
    source = [] if model is None else [f"model.source={json.dumps(model)}"]
    create_workspace(workspace, with_settings(given, [*source, *(settings or [])]))
    out.print(f"{workspace}: ready. Next, with a skill folder (perdure import makes one): perdure check SKILL -w "
              f"{workspace}", soft_wrap=True)  # fmt: skip


@app.command("import")
def import_skill(
    source: Annotated[
        str,
        typer.Argument(
            help="home-assistant, bfcl, bfcl-mixed, bfcl-multi, mmlu, sst2, tldr, commands, sciq, facts, forms-NAME, "
            "docs, jsonl."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Skill folder to make.")],
    file: Annotated[
        Path | None, typer.Option("--file", help="jsonl: the demonstrations; docs: a document, or a folder of them.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", help="docs only: a JSONL file of questions and answers.")
    ] = None,
    ask: Annotated[
        str | None, typer.Option("--ask", help="docs only: 'model', or an OpenAI-compatible URL, writes the questions.")
    ] = None,
    ask_model: Annotated[str | None, typer.Option("--ask-model", help="The model to ask at the URL of --ask.")] = None,
    pretest: Annotated[
        bool, typer.Option("--pretest", help="docs only: leave out facts that the model knows already.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option("--save-questions", help="Also write the questions, as --questions takes them.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For --ask and --pretest, who will be taught: embedded (the default) ...")
    ] = None,
    workspace: Annotated[
        Path | None, typer.Option("--workspace", "-w", help="... or the champion of this workspace.")
    ] = None,
    grader: Annotated[
        str | None, typer.Option(help="jsonl and docs: how answers are graded; default: exact, and contains.")
    ] = None,
    test_share: Annotated[float, typer.Option(help="jsonl only: share of the rows held out.", min=0.01, max=0.9)] = 0.2,
    turns: Annotated[
        Literal["last", "all"], typer.Option(help="jsonl only: learn a conversation's last answer, or each of them.")
    ] = "last",
    seed: Annotated[int, typer.Option(help="Of the split and of drawn rows.")] = 0,
) -> None:
    """Make a skill folder of a file or a known source.

    Of a JSONL file or documents of your own, or of one of the data packages."""
    from perdure.importers import run_importer

    given: Path | Questions | None = questions
    asking = _Asking(ask, ask_model, pretest, save, model, workspace)
    if used := [name for name, value in vars(asking).items() if value]:
        if source != "docs":
            raise InputError(f"perdure import {source}: --{used[0].replace('_', '-')} is for docs only")
        _check_asking(asking, questions, turns)
        given = _prepared(asking, target, file, questions, grader, seed)
    run_importer(source, target, seed, file, grader, test_share, turns, given)
    _say_imported(target, source)


def _say_imported(target: Path, source: str) -> None:
    """What was made, and what its test rows are good for."""
    from perdure.gates import USUAL_NOISE, guards_of, least_budget
    from perdure.skills.base import load_skill

    skill = load_skill(target)
    least = least_budget(len(skill.test), guards_of(1, len(RunConfig().probe.tasks)), GateConfig(), USUAL_NOISE)
    enough = f"can guard it with a retention budget of {100 * least:.1f} points (set it in skill.toml before teaching)"
    guarded = enough if least < 0.2 else "are too few to guard it when later skills follow: bring more"
    origin = f" ({skill.settings.source})" if source == "jsonl" else ""
    said = (
        f"{target}: {len(skill.train)} training and {len(skill.test)} test rows{origin}. So many test rows {guarded}."
    )
    out.print(Text(f"{said} Next: perdure check {shlex.quote(str(target))} -w WORKSPACE"), soft_wrap=True)


@dataclass(frozen=True)
class _Asking:
    """Options of ``import docs`` by which a model writes the questions, or is asked what it knows."""

    ask: str | None = None
    ask_model: str | None = None
    pretest: bool = False
    save_questions: Path | None = None
    model: str | None = None
    workspace: Path | None = None


def _check_asking(asking: _Asking, questions: Path | None, turns: str) -> None:
    """Raises InputError for options that do not go together."""
    at_url, asks = asking.ask not in (None, "model"), asking.ask or asking.pretest
    problems = {
        "give --questions or --ask, not both": questions and asking.ask,
        "--pretest needs --questions FILE": asking.pretest and not (questions or asking.ask),
        "--ask takes 'model', or a URL with --ask-model NAME, the model's name there": at_url and not asking.ask_model,
        "--ask-model goes with --ask URL": asking.ask_model and not at_url,
        "--save-questions, --model and --workspace go with --ask or --pretest": not asks,
        "give --model or --workspace, not both": asking.model and asking.workspace,
        "--turns is for jsonl only": turns != "last",
    }
    for problem, found in problems.items():
        if found:
            raise InputError(f"perdure import docs: {problem}")


def _prepared(asking: _Asking, target: Path, file: Path | None, questions: Path | None, grader: str | None,
              seed: int) -> Questions:  # fmt: skip
    """The questions that a model writes, or those of the file without what it knows. Raises InputError for whatever
    can be found out before any model is asked."""
    from perdure.files import check_free, write_jsonl
    from perdure.importers.docs import divided, read_questions
    from perdure.importers.passages import read_passages
    from perdure.question_writers import Endpoint
    from perdure.questions import Student, pretest, write_questions
    from perdure.report.words import safe_line
    from perdure.skills.graders import make_grader

    if file is None:
        raise InputError("perdure import docs: name document or folder with --file")
    check_free(target)
    save = asking.save_questions
    if save and save.exists():
        raise InputError(f"{save}: already there; choose another file for --save-questions")
    if save and save.resolve().is_relative_to(target.resolve()):
        raise InputError(f"{save}: a skill folder holds its own files only; save the questions outside of {target}")
    make_grader(grader or "contains", {}, where="--grader")
    passages, name = read_passages(file), asking.ask_model
    writer = Endpoint(asking.ask, name) if asking.ask and name else None
    own = read_questions(questions) if questions else None
    if own is not None:
        divided(own, passages)
    session, label = _asked_model(asking.model, asking.workspace)
    student = Student(session.engine, session.renderer, seed)
    if own is not None:
        found, said = pretest(own, student, reporter())
    else:
        found, said = write_questions(passages, writer or student, student, reporter(), name or label)
    out.print(safe_line(said), soft_wrap=True)
    if save:
        write_jsonl(save, [row for _, row in found.rows])
    where = f"{save}: read and mend the questions there" if save else "Read them: --save-questions FILE writes them"
    out.print(f"{where}; --questions FILE takes them again.", soft_wrap=True)
    return found


def _asked_model(model: str | None, workspace: Path | None) -> tuple[Session, str]:
    """The model that will be taught, loaded, and what to call it."""
    from perdure.report.words import model_label
    from perdure.running import open_version
    from perdure.session import open_session

    if workspace is None:
        config = with_settings(RunConfig(), [] if model is None else [f"model.source={json.dumps(model)}"])
        return open_session(config), model_label(config.model.source)
    place, config = open_workspace(workspace, None)
    champion = place.resolve("champion")
    return open_version(place, champion, config), f"{champion} of {workspace}"


@app.command()
def check(
    skills: Annotated[list[Path], typer.Argument(help="Skill folders.")],
    workspace: WorkspaceOption = HERE,
    settings: SetOption = None,
    hardware: Annotated[
        str | None, typer.Option(help="Only the memory and time of a step there, by arithmetic: 1xH100-80GB.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Will this work, and what will it cost?

    Data, windows, teacher gap, the method to take. Exit code 1: not ready."""
    from perdure.curriculum import check_hardware, check_skills
    from perdure.report.text import hardware_tables, preflight_tables

    place, config = open_workspace(workspace, settings)
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
    method: Annotated[
        str | None,
        typer.Option(help="sdft, sft ... (docs/method.md), or auto, as check recommends; default: perdure.toml."),
    ] = None,
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
) -> None:
    """Teach skills, keep what it knew, or refuse.

    Preflight, train, evaluate everything, gate; promote, hold or refuse. Exit code 1: not all were promoted."""
    from perdure.curriculum import learn as learn_skills
    from perdure.report.html import write_report
    from perdure.report.numbers import summary
    from perdure.report.text import render

    if method and method not in (*METHODS, AUTO):
        raise InputError(f"--method {method}: one of {', '.join((*METHODS, AUTO))}")
    extra = [f'train.method="{method}"'] if method else []
    extra += [] if repair is None else [f"gate.repair={6 if repair else 0}"]
    place, config = open_workspace(workspace, [*extra, *(settings or [])])
    with place.lock():
        outcomes = learn_skills(place, skills, config, reporter(), force=force, restart=restart)
        report = write_report(place.folder)
    render(summary(place.folder), out)
    if profile:
        _profile(place, config, [outcome.stage for outcome in outcomes])
    for outcome in outcomes:
        if outcome.decision != "promoted":
            out.print(Text(f"{outcome.skill} was {outcome.decision}: {' '.join(outcome.reasons)}"), soft_wrap=True)
    out.print(f"\nReport: {report}", soft_wrap=True)
    raise typer.Exit(0 if all(outcome.decision == "promoted" for outcome in outcomes) else REFUSED)


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
    skill: Annotated[list[Path] | None, typer.Option("--skill", help="Skill folder; default: all taught ones.")] = None,
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
