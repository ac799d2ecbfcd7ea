"""Commands that look at versions and change nothing: what there is, how good it is, what it says."""

from __future__ import annotations

import json
import sys
import webbrowser
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.text import Text

from perdure.cli_common import (
    HERE,
    REFUSED,
    JsonOption,
    SameOption,
    WorkspaceArgument,
    WorkspaceOption,
    app,
    open_place,
    open_workspace,
    out,
    reporter,
    the_one,
)
from perdure.files import read_json
from perdure.report.words import safe_line, safe_text
from perdure.types import InputError


@app.command()
def status(workspace: WorkspaceArgument = None, same: SameOption = None, as_json: JsonOption = False) -> None:
    """The champion, how well it knows its skills, and what waits."""
    from perdure.report.numbers import summary
    from perdure.report.text import skill_table

    workspace = the_one(workspace, same)
    place = open_place(workspace)
    unfinished = place.unfinished()
    state: dict[str, Any] = {**place.aliases(), "skills": list(place.taught()), "unfinished": unfinished}
    if as_json:
        from perdure.scores import known_scores

        scores = known_scores(place, state["champion"]).skills
        state["scores"] = {name: {key: scores[name][key] for key in ("accuracy", "low", "high", "n")}
                           for name in state["skills"] if name in scores}  # fmt: skip
        out.print_json(json.dumps(state))
        return
    out.print(f"champion  {state['champion']}   previous  {state['previous'] or '-'}")
    if state["skills"]:
        skill_table(summary(place.folder), state["skills"], out)
    else:
        out.print(Text(f"No skill was taught yet: perdure learn SKILL -w {workspace}"), soft_wrap=True)
    if waiting := state["candidate"]:
        why = place.verdict(waiting)
        said = f"{waiting} is held: {why['reasons'][0] if why else ''} To serve it: perdure promote {waiting}"
        forced = "" if why is None or why["decision"] == "promoted" else ' --force --reason "..."'
        out.print(Text(safe_line(f"{said} -w {workspace}{forced}")), soft_wrap=True)
    for stage in unfinished:
        told = read_json(place.run_folder(stage) / "stage.json")
        command = "forget" if told.get("branch") else "learn"
        what = f"repeat the {command} command to go on with it"
        if command == "learn" and (parent := told.get("parent")) != state["champion"]:
            what = f"it began at {parent}, which is not the champion any more"
        out.print(Text(safe_line(f"unfinished stage {stage}: {what}")), soft_wrap=True)


@app.command()
def log(workspace: WorkspaceArgument = None, same: SameOption = None, as_json: JsonOption = False) -> None:
    """The ledger, oldest event first, and what each stage cost.

    Beside it what was predicted. A broken chain is an error."""
    place = open_place(the_one(workspace, same))
    place.verify_ledger()
    events = place.ledger()
    if as_json:
        out.print_json(json.dumps(events))
        return
    from perdure.report.record import read_version
    from perdure.report.text import cost_table, ledger_table

    ledger_table(events, out)
    cost_table([read_version(place, name) for name in place.versions()[1:]], out)


@app.command()
def verify(workspace: WorkspaceArgument = None, same: SameOption = None, as_json: JsonOption = False) -> None:
    """Check that nothing was changed behind Perdure's back.

    Every byte of versions, skills and ledger, against what was written. Exit code 1: something was changed."""
    workspace = the_one(workspace, same)
    from perdure.verify import verify as problems_of_workspace

    if not (workspace / "perdure.toml").is_file():
        raise InputError(f"{workspace}: not a workspace (no perdure.toml)")
    with reporter().phase("verify", 0, "folders") as phase:
        problems = problems_of_workspace(workspace, lambda done, total: phase.update(done, total))
    if as_json:
        out.print_json(json.dumps({"problems": problems}))
    else:
        for problem in problems:
            out.print(Text(safe_text(problem)), soft_wrap=True)
        out.print("Everything is as it was written." if not problems else f"{len(problems)} problems.")
    raise typer.Exit(REFUSED if problems else 0)


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="v3, champion, previous or candidate.")] = "champion",
    workspace: WorkspaceOption = HERE,
) -> None:
    """A version's record, as JSON.

    Its parent, skill, scores, verdict, hashes, settings and cost. A later verdict, under another gate, stands in
    ``later_verdict``."""
    place = open_place(workspace)
    info, last = place.version(version), place.verdict(version)
    own = info.get("verdict") or {}
    later = {"later_verdict": last} if last and last["decision"] != own.get("decision") else {}
    out.print_json(json.dumps(info | later))


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="v3, champion, previous or candidate.")] = "previous",
    second: Annotated[str, typer.Argument(help="The same.")] = "champion",
    workspace: WorkspaceOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Two versions side by side.

    Every score on the same items, and the settings that differ."""
    from perdure.compare import compare
    from perdure.report.text import diff_tables

    place = open_place(workspace)
    found = compare(place, first, second)
    if as_json:
        out.print_json(json.dumps(found))
    else:
        diff_tables(found, out)


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="One question; none: a conversation, to Ctrl-D.")] = None,
    workspace: WorkspaceOption = HERE,
    versions: Annotated[
        list[str] | None,
        typer.Option("--version", metavar="VERSION", help="champion (the default), v0 ...; several answer in turn."),
    ] = None,
    skill: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With the system prompt and the tools of this skill's first test row."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest answer, as in evaluations.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
) -> None:
    """Ask a version, or several, and read what they say."""
    from perdure.chat import Chat, setting_of
    from perdure.running import open_version

    place, config = open_workspace(workspace, None)
    names = list(dict.fromkeys(place.resolve(name) for name in versions or ["champion"]))
    said, tools = setting_of(place, skill, names) if skill else (None, ())
    system = system or said
    if not skill and not system and (taught := place.taught()):
        reporter().note(f"Without system prompt and tools. With those of a skill: --skill {', '.join(taught)}")
    chats = {name: Chat(open_version(place, name, config), max_new_tokens, temperature, config.seed, system, tools)
             for name in names}  # fmt: skip
    for text in _asked() if prompt is None else [prompt]:
        for name, conversation in chats.items():
            label = f"{name}: " if len(names) > 1 else ""
            out.print(
                Text(label, style="bold").append(safe_text(conversation.say(text)), style="not bold"), soft_wrap=True
            )


def _asked() -> Iterator[str]:
    """What a person types, line by line, until the end of the input."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            return
        if text:
            yield text


@app.command()
def report(
    workspace: WorkspaceArgument = None,
    same: SameOption = None,
    as_json: JsonOption = False,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write report.html; with --json print its numbers instead."""
    from perdure.report.html import write_report
    from perdure.report.numbers import summary

    place = open_place(the_one(workspace, same))
    if as_json:
        out.print_json(json.dumps(summary(place.folder)))
        return
    path = write_report(place.folder)
    out.print(str(path), soft_wrap=True)
    if open_it:
        webbrowser.open(path.resolve().as_uri())
