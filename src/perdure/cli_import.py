"""``perdure import``: a skill folder of a file, of documents, or of a known source."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from perdure.cli_common import app, open_workspace, out, reporter
from perdure.config import GateConfig, RunConfig, toml_value, with_settings
from perdure.types import InputError

if TYPE_CHECKING:
    from perdure.importers.docs import Questions
    from perdure.session import Session


@app.command("import")
def import_skill(
    source: Annotated[
        str,
        typer.Argument(
            help="jsonl and docs: data of yours. Of the data packages: home-assistant (intents), sst2 (sentiment), "
            "commands and tldr (shell), sciq (science), mmlu (to which desk?), bfcl, bfcl-mixed and bfcl-multi (tool "
            "calls), facts, forms-date, forms-order ... (forms-? lists all)."
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
    grader_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="jsonl only: an option of the grader (repeatable), such as pattern=..."),
    ] = None,
    test_share: Annotated[
        float | None, typer.Option(help="jsonl only: share of the rows held out; default: 0.2.", min=0.01, max=0.9)
    ] = None,
    turns: Annotated[
        Literal["last", "all"] | None,
        typer.Option(help="jsonl only: learn a conversation's last answer (the default), or each of them."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="jsonl and docs: leave out what cannot be used, and say what it is.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the split and of drawn rows.")] = 0,
) -> None:
    """Make a skill folder of a file or a known source.

    Of a JSONL file or documents of your own, or of one of the data packages."""
    from perdure.importers import check_options, run_importer
    from perdure.skills.reading import counted, in_short

    options = {key: value for option in grader_option for key, value in [_pair(option)]} if grader_option else None
    check_options(source, turns=turns, test_share=test_share, questions=questions, file=file, grader=grader,
                  grader_option=options, skip_bad=skip_bad or None)  # fmt: skip
    skipped: list[str] | None = [] if skip_bad else None
    given: Path | Questions | None = questions
    asking = _Asking(ask, ask_model, pretest, save, model, workspace)
    if used := [name for name, value in vars(asking).items() if value]:
        if source != "docs":
            raise InputError(f"perdure import {source}: --{used[0].replace('_', '-')} is for docs only")
        _check_asking(asking, questions)
        given = _prepared(asking, target, file, questions, grader, seed, skipped)
    run_importer(source, target, seed, file, grader, test_share, turns, given, options, skipped)
    _replies_for(target).unlink(missing_ok=True)
    if skipped:
        problems = list(dict.fromkeys(skipped))  # documents are read once to be asked about, and once to be written
        reporter().note(f"Left out ({counted(problems, 'problem')}):\n{in_short(problems)}")
    _say_imported(target, source)


def _replies_for(target: Path) -> Path:
    """Where an endpoint's replies are kept until the skill folder is there."""
    return target.with_name(f".{target.name}.replies.jsonl")


def _pair(option: str) -> tuple[str, object]:
    key, equals, value = option.partition("=")
    if not equals:
        raise InputError(f"--grader-option {option}: expected key=value, such as pattern=[0-9]+")
    return key.strip(), toml_value(value)


def _say_imported(target: Path, source: str) -> None:
    """What was made, and what its test rows are good for."""
    from perdure.gates import USUAL_NOISE, guards_of, least_budget
    from perdure.skills.base import independent, load_skill
    from perdure.skills.doubts import doubts
    from perdure.skills.graders.tool_call import calls_for

    skill = load_skill(target)
    units = independent(skill.test)
    least = least_budget(units, guards_of(1, len(RunConfig().probe.tasks)), GateConfig(), USUAL_NOISE)
    default = GateConfig().budget
    more = "bring more rows, or " if source in ("jsonl", "docs") else ""  # the others have what they have
    guarded = "are too few to guard it when later skills follow" + (": bring more" if more else "")
    if least < 0.2:
        guarded = f"can judge a retention budget of {100 * least:.1f} points"
        guarded += f"; the default is {100 * default:g}" if least <= default else (
            f", and the default is {100 * default:g}: {more}write retention_budget = {least:.3f} "
            "into skill.toml before you teach it")  # fmt: skip
    turns, what = ("", "test rows") if units == len(skill.test) else (f", {units} independent", "independent ones")
    origin = f" ({skill.settings.source})" if source == "jsonl" else ""
    rows = f"{len(skill.train)} training and {len(skill.test)} test rows{turns}{origin}"
    called = "" if skill.name == target.name else f"the skill is called {skill.name!r}, "
    said = f"{target}: {called}{rows}. So many {what} {guarded}."
    said += "".join(f" {line}" for line in doubts(skill)) if source == "jsonl" else ""
    if skill.settings.grader == "tool_call":
        if source == "jsonl" and not any(example.tools for example in skill.train):
            said += " No row has 'tools': unless the prompts say it, the model is not told which functions there are."
        rows = (*skill.train, *skill.test)
        if source == "jsonl" and (bare := sum(not calls_for(row) for row in rows)):
            said += (f" In {bare} of the {len(rows)} rows no call is right: there any answer without a call counts, "
                     "whatever it says.")  # fmt: skip
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


def _check_asking(asking: _Asking, questions: Path | None) -> None:
    """Raises InputError for options that do not go together."""
    at_url, asks = asking.ask not in (None, "model"), asking.ask or asking.pretest
    problems = {
        "give --questions or --ask, not both": questions and asking.ask,
        "--pretest needs --questions FILE": asking.pretest and not (questions or asking.ask),
        "--ask takes 'model', or a URL with --ask-model NAME, the model's name there": at_url and not asking.ask_model,
        "--ask-model goes with --ask URL": asking.ask_model and not at_url,
        "--save-questions, --model and --workspace go with --ask or --pretest": not asks,
        "give --model or --workspace, not both": asking.model and asking.workspace,
    }
    for problem, found in problems.items():
        if found:
            raise InputError(f"perdure import docs: {problem}")


def _prepared(asking: _Asking, target: Path, file: Path | None, questions: Path | None, grader: str | None,
              seed: int, skipped: list[str] | None) -> Questions:  # fmt: skip
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
    passages, name = read_passages(file, skipped), asking.ask_model
    writer = Endpoint(asking.ask, name, kept=_replies_for(target)) if asking.ask and name else None
    own = read_questions(questions, skipped) if questions else None
    if own is not None:
        divided(own, passages, skipped)
    session, label = _asked_model(asking.model, asking.workspace)
    student = Student(session.engine, session.renderer, seed)
    if own is not None:
        found, said = pretest(own, student, reporter())
    else:
        found, said = write_questions(passages, writer or student, student, reporter(), name or label)
    out.print(safe_line(f"{said} {label} was asked what it knows." if writer else said), soft_wrap=True)
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
