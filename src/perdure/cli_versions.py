"""Commands about versions: what there is, what was served, what is served from now on."""

from __future__ import annotations

import json
import sys
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from perdure.cli_common import (
    BAD_INPUT,
    HERE,
    REFUSED,
    JsonOption,
    SameOption,
    SetOption,
    WorkspaceArgument,
    WorkspaceOption,
    actor,
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
def status(workspace: WorkspaceArgument = HERE, same: SameOption = None, as_json: JsonOption = False) -> None:
    """The champion, how well it knows its skills, and what waits."""
    from perdure.report.numbers import summary
    from perdure.report.text import skill_table

    workspace = the_one(workspace, same)
    place = open_place(workspace)
    unfinished = place.unfinished()
    state: dict[str, Any] = {**place.aliases(), "skills": list(place.taught()), "unfinished": unfinished}
    if as_json:
        from perdure.scores import known_scores

        scores = known_scores(place, "champion").skills
        state["scores"] = {name: {key: scores[name][key] for key in ("accuracy", "low", "high", "n")}
                           for name in state["skills"] if name in scores}  # fmt: skip
        out.print_json(json.dumps(state))
        return
    out.print(f"champion  {state['champion']}   previous  {state['previous'] or '-'}")
    if state["skills"]:
        skill_table(summary(place.folder), state["skills"], out)
    else:
        out.print("No skill was taught yet: perdure learn SKILL")
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
def log(workspace: WorkspaceArgument = HERE, same: SameOption = None, as_json: JsonOption = False) -> None:
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
def verify(workspace: WorkspaceArgument = HERE, same: SameOption = None, as_json: JsonOption = False) -> None:
    """Check that nothing was changed behind Perdure's back.

    Every byte of versions, skills and ledger, against what was written. Exit code 2: something was changed."""
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
    raise typer.Exit(BAD_INPUT if problems else 0)


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="v3, champion, previous or candidate.")] = "champion",
    workspace: WorkspaceOption = HERE,
) -> None:
    """A version's record, as JSON.

    Its parent, skill, scores, verdict, hashes, settings and cost."""
    place = open_place(workspace)
    out.print_json(json.dumps(place.version(version)))


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
def promote(
    version: Annotated[str, typer.Argument(help="Version to make the champion.")],
    workspace: WorkspaceOption = HERE,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the ledger.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Although the gate did not pass it; needs --reason.")] = False,
) -> None:
    """Make a version the champion. One that the gate held or refused needs --force and a reason; both stay in the
    ledger. Exit code 1: the gate did not pass it."""
    from perdure.verify import problems_of_version

    place = open_place(workspace)
    if force and not (reason or "").strip():
        raise InputError("--force needs --reason: the ledger keeps why the gate was overruled")
    name = place.resolve(version)
    verdict = place.verdict(name)
    passed = verdict is None or verdict["decision"] == "promoted"
    if verdict and not passed and not force:
        words = f"{name} was {verdict['decision']} by the gate: {verdict['reasons'][0]} To serve it all the same: "
        out.print(Text(safe_line(f'{words}perdure promote {name} --force --reason "..."')), soft_wrap=True)
        raise typer.Exit(REFUSED)
    if problems := problems_of_version(place, name):
        raise InputError("\n".join(problems))
    forced: dict[str, Any] = {} if passed else {"forced": True}
    place.promote(name, reason or "by hand", by=actor(), **forced)
    out.print(f"champion: {name}")


@app.command()
def forget(
    skill: Annotated[str, typer.Argument(help="Name of a skill that the champion was taught.")],
    workspace: WorkspaceOption = HERE,
    settings: SetOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin an unfinished stage anew.")] = False,
) -> None:
    """Take a skill out.

    Replays the chain without it, gates the result, promotes it. Exit code 1: not promoted."""
    from perdure.forgetting import forget as forget_skill
    from perdure.report.html import write_report

    place, config = open_workspace(workspace, settings)
    with place.lock():
        done = forget_skill(place, skill, config, reporter(), restart=restart)
        write_report(place.folder)
    out.print(f"{done.skill}: {done.before:.1%} before, {done.after:.1%} without it, on {done.n} items")
    for reason in done.reasons:
        out.print(Text(safe_line(reason)), soft_wrap=True)
    verb = "is the champion" if done.decision == "promoted" else f"was {done.decision}; the champion stays"
    out.print(f"{done.version} {verb}")
    raise typer.Exit(0 if done.decision == "promoted" else REFUSED)


@app.command()
def erase(
    skill: Annotated[str, typer.Argument(help="Name of a skill that the champion was not taught (perdure forget).")],
    workspace: WorkspaceOption = HERE,
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without: say what would be erased.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the ledger.")] = None,
) -> None:
    """Remove a skill's rows for good.

    Its demonstrations, all answers to its rows, and the weights of every version that was trained on them."""
    from perdure.erasing import erase as erase_skill
    from perdure.erasing import what_holds

    place = open_place(workspace)
    found = what_holds(place, skill)
    what = f"{found.present} files, {found.size / 1e6:.1f} MB"
    what += f", among them the weights of {', '.join(found.versions)}" if found.versions else ""
    if not yes:
        out.print(Text(f"{skill}: {what}. They cannot be brought back: --yes erases them."), soft_wrap=True)
        raise typer.Exit(REFUSED)
    with place.lock():
        erase_skill(place, skill, **({"by": actor()} | ({"reason": reason} if reason else {})))
    out.print(Text(f"{skill}: erased {what}. Not touched: the folder it was imported from, exports, backups."),
              soft_wrap=True)  # fmt: skip


@app.command()
def rollback(
    workspace: WorkspaceOption = HERE,
    to: Annotated[
        str | None, typer.Option(help="Version to go back to; default: the champion before this one.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the ledger.")] = None,
) -> None:
    """Go back to an earlier version.

    No weights are moved: it takes no time, also while a stage trains. What that stage ends with is then held."""
    about = {"by": actor()} | ({"reason": reason} if reason else {})
    out.print(f"champion: {open_place(workspace).rollback(to, **about)}")


@app.command()
def sync(
    tracker: Annotated[str, typer.Argument(help="mlflow.")],
    workspace: WorkspaceOption = HERE,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow's; default: an SQLite file in the workspace.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of experiment and registered model; default: the folder's.")] = None,
) -> None:
    """Mirror versions and scores into MLflow.

    Aliases, too. The workspace stays the truth; repeating it adds nothing."""
    from perdure.trackers import sync_mlflow

    if tracker != "mlflow":
        raise InputError(f"no tracker {tracker!r}; there is: mlflow")
    place = open_place(workspace)
    mirror = sync_mlflow(place, tracking_uri, name)
    out.print(f"{mirror.uri}: {len(mirror.added)} versions added to {mirror.model}", soft_wrap=True)
    for alias, version in mirror.aliases.items():
        out.print(f"{alias}: {version}")


@app.command()
def export(
    version: Annotated[str, typer.Argument(help="v3, champion, previous or candidate.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    workspace: WorkspaceOption = HERE,
    adapter: Annotated[bool, typer.Option("--adapter", help="The difference to --since, as a LoRA adapter.")] = False,
    since: Annotated[str, typer.Option("--since", help="Version below the adapter; v0 is the base model.")] = "v0",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of the adapter; by default the least.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of whole weights: bfloat16, float16, float32.")] = "bfloat16",
    as_json: JsonOption = False,
) -> None:
    """A version for serving, whole or as an adapter.

    Whole weights, or with --adapter a LoRA adapter for peft or vLLM."""
    from perdure.export import DTYPES, MOST_RANK, export_adapter, export_weights

    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    if not adapter and (rank is not None or since != "v0"):
        raise InputError("--rank and --since are of an adapter: add --adapter")
    if adapter and rank is not None and rank > MOST_RANK:
        raise InputError(f"--rank {rank}: at most {MOST_RANK}")
    place = open_place(workspace)
    found = (export_adapter(place, version, since, folder, rank) if adapter
             else export_weights(place, version, folder, dtype))  # fmt: skip
    if as_json:
        out.print_json(json.dumps(found))
        return
    what = f"{found['dtype']} weights" if not adapter else (
        f"adapter of rank {found['rank']} on {found['since']}, {found['share']:.2%} of the difference")  # fmt: skip
    out.print(f"{found['version']}: {what}, {found['bytes'] / 1e6:.1f} MB in {folder}")


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="One question; none: a conversation, to Ctrl-D.")] = None,
    workspace: WorkspaceOption = HERE,
    versions: Annotated[
        list[str] | None,
        typer.Option("--version", metavar="VERSION", help="champion (the default), v0 ...; several answer in turn."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt, as the skill's rows have it.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest answer, as in evaluations.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
) -> None:
    """Ask a version, or several, and read what they say."""
    from perdure.chat import Chat
    from perdure.running import open_version

    place, config = open_workspace(workspace, None)
    names = list(dict.fromkeys(place.resolve(name) for name in versions or ["champion"]))
    chats = {name: Chat(open_version(place, name, config), max_new_tokens, temperature, config.seed, system)
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
    workspace: WorkspaceArgument = HERE,
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
