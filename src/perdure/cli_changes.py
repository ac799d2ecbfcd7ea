"""Commands that change what is served or kept, and those that hand a version on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from perdure.cli_common import (
    HERE,
    REFUSED,
    JsonOption,
    SetOption,
    WorkspaceOption,
    actor,
    app,
    open_place,
    open_workspace,
    out,
    reporter,
)
from perdure.report.words import safe_line
from perdure.types import InputError


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="Version to make the champion.")],
    workspace: WorkspaceOption = HERE,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the ledger.")] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Although the gate did not pass it, or it lacks a skill of the champion; needs --reason.",
        ),
    ] = False,
) -> None:
    """Make a version the champion. One that the gate held or refused, or that was not taught what the champion was,
    needs --force and a reason; both stay in the ledger. Exit code 1: it is not promoted."""
    from perdure.verify import problems_of_version

    place = open_place(workspace)
    if force and not (reason or "").strip():
        raise InputError("--force needs --reason: the ledger keeps why the gate was overruled")
    name = place.resolve(version)
    place.check_not_erased(name)
    verdict = place.verdict(name)
    passed = verdict is None or verdict["decision"] == "promoted"
    if verdict and not passed and not force:
        words = f"{name} was {verdict['decision']} by the gate: {verdict['reasons'][0]} To serve it all the same: "
        out.print(Text(safe_line(f'{words}perdure promote {name} -w {workspace} --force --reason "..."')),
                  soft_wrap=True)  # fmt: skip
        raise typer.Exit(REFUSED)
    if problems := problems_of_version(place, name):
        raise InputError("\n".join(problems))
    lost = [skill for skill in place.taught() if skill not in place.taught(name)]
    if lost and not force:
        words = f"{name} was not taught {', '.join(lost)}, which the champion {place.resolve('champion')} was. "
        words += f"To go back to it: perdure rollback --to {name} -w {workspace}" if place.was_served(name) else (
            f'To serve it all the same: perdure promote {name} -w {workspace} --force --reason "..."')  # fmt: skip
        out.print(Text(safe_line(words)), soft_wrap=True)
        raise typer.Exit(REFUSED)
    forced: dict[str, Any] = {"forced": True} if lost or not passed else {}
    place.promote(name, reason or "by hand", by=actor(), **forced)
    out.print(f"champion: {name}")


@app.command()
def rollback(
    workspace: WorkspaceOption = HERE,
    to: Annotated[
        str | None,
        typer.Option(help="Version to go back to; default: the one in whose place the champion was promoted."),
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the ledger.")] = None,
) -> None:
    """Go back to an earlier version.

    No weights are moved: it takes no time, also while a stage trains. What that stage ends with is then held."""
    out.print(f"champion: {open_place(workspace).rollback(to, **_on_record(reason))}")


def _on_record(reason: str | None) -> dict[str, str]:
    """Who did it and why, for the ledger."""
    return {"by": actor()} | ({"reason": reason} if reason else {})


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
def prune(
    workspace: WorkspaceOption = HERE,
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without: say what would be removed.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the ledger.")] = None,
) -> None:
    """Make room on the disk.

    Removes the weights of refused versions on which nothing stands, and the checkpoints of unfinished stages that
    nothing goes on with. Scores, verdicts and lineage stay."""
    from perdure.pruning import prunable
    from perdure.pruning import prune as prune_versions

    place = open_place(workspace)
    found = prunable(place)
    if yes and (found.versions or found.stages):
        with place.lock():
            found = prune_versions(place, **_on_record(reason))
    parts = [f"weights of {', '.join(found.versions)}"] if found.versions else []
    parts += [f"checkpoints of {', '.join(found.stages)}"] if found.stages else []
    if not parts:
        out.print("Nothing to prune.")
        return
    what = f"{' and the '.join(parts)}, {found.size / 1e6:.1f} MB"
    if not yes:
        out.print(Text(f"The {what}. They cannot be brought back: --yes removes them."), soft_wrap=True)
        raise typer.Exit(REFUSED)
    out.print(Text(f"Removed the {what}."), soft_wrap=True)


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
    what += f", among them the weights of {', '.join(found.weights)}" if found.weights else ""
    if not yes:
        out.print(Text(f"{skill}: {what}. They cannot be brought back: --yes erases them."), soft_wrap=True)
        raise typer.Exit(REFUSED)
    with place.lock():
        erase_skill(place, skill, **_on_record(reason))
    left = ["the folder it was imported from", "exports", "backups"]
    left += [f"{path} (a workspace of its own, which was taught it, too)" for path in found.elsewhere]
    out.print(Text(f"{skill}: erased {what}. Not touched: {', '.join(left)}."), soft_wrap=True)


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
    from perdure.stacks import is_stacked

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
    if adapter and is_stacked(place.version_folder(since)):
        out.print(
            f"{found['since']} keeps an adapter itself; whole weights below this one: perdure export {since} FOLDER"
        )
