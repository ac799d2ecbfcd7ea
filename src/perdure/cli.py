"""The command line: the only place that wires things together. Heavy imports wait until a command needs them."""

from __future__ import annotations

import errno
import json
import signal
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from perdure import __version__
from perdure.config import RunConfig, with_settings
from perdure.types import InputError

if TYPE_CHECKING:
    from perdure.workspace import Workspace

REFUSED, BAD_INPUT, INTERRUPTED = 1, 2, 3
_BY_SIGNAL = 130
"""What typer exits with when Ctrl-C reaches it."""
_PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)

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
WorkspaceArgument = Annotated[Path, typer.Argument(envvar="PERDURE_WORKSPACE", help="Workspace folder.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="A setting as in perdure.toml: train.steps=80")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
HERE = Path(".")


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


@app.command()
def demo(
    workspace: WorkspaceOption = Path("demo-workspace"),
    compare: Annotated[str | None, typer.Option("--compare", help="Also run the chain with this method: sft.")] = None,
) -> None:
    """The embedded model learns three real skills in a row; the report shows what it learned and kept."""
    from perdure.demo import run_demo
    from perdure.report.text import render

    summary, report = run_demo(workspace, compare, _reporter())
    render(summary, out)
    out.print(f"\nReport: {report}", soft_wrap=True)


@app.command()
def init(
    workspace: Annotated[Path, typer.Argument(help="Folder to make.")],
    model: Annotated[str, typer.Option(help="embedded, a folder, a GGUF file or a hub id.")] = "embedded",
    settings: SetOption = None,
) -> None:
    """Make a workspace whose champion is the base model."""
    from perdure.stages import create_workspace

    config = with_settings(RunConfig(), [f"model.source={json.dumps(model)}", *(settings or [])])
    create_workspace(workspace, config)
    out.print(f"{workspace}: ready. Next: perdure check skills/NAME -w {workspace}", soft_wrap=True)


@app.command("import")
def import_skill(
    source: Annotated[str, typer.Argument(help="home-assistant, bfcl, mmlu, sst2, tldr or jsonl.")],
    target: Annotated[Path, typer.Argument(help="Skill folder to make.")],
    file: Annotated[Path | None, typer.Option("--file", help="jsonl only: the demonstrations.")] = None,
    grader: Annotated[str, typer.Option(help="jsonl only: how answers are graded.")] = "exact",
    test_share: Annotated[float, typer.Option(help="jsonl only: share of the rows held out.", min=0.01, max=0.9)] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the split and of drawn rows.")] = 0,
) -> None:
    """Bring a known source, or a JSONL file of your own, into a skill folder."""
    from perdure.importers import run_importer

    run_importer(source, target, seed, file, grader, test_share)
    out.print(f"{target}: ready. Next: perdure check {target}", soft_wrap=True)


@app.command()
def check(
    skills: Annotated[list[Path], typer.Argument(help="Skill folders.")],
    workspace: WorkspaceOption = HERE,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Will this work, and what will it cost? Data, windows, teacher gap. Exit code 1: not ready."""
    from perdure.curriculum import check_skills
    from perdure.report.text import preflight_tables

    place, config = _open(workspace, settings)
    results = check_skills(place, skills, config, _reporter())
    if as_json:
        out.print_json(json.dumps({"skills": results}))
    else:
        preflight_tables(results, out)
    raise typer.Exit(0 if all(result["ready"] for result in results) else REFUSED)


@app.command()
def learn(
    skills: Annotated[list[Path], typer.Argument(help="Skill folders, taught in this order.")],
    workspace: WorkspaceOption = HERE,
    method: Annotated[str | None, typer.Option(help="sdft or sft; default: perdure.toml.")] = None,
    settings: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Train although the preflight sees no teacher gap.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin an unfinished stage anew.")] = False,
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="All five attempts to save a candidate that hurt something, or none; default: gate.repair.",
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Where each stage's training time went.")] = False,
) -> None:
    """Teach skills: preflight, train, evaluate everything, gate; promote, hold or refuse. Exit code 1: not all were
    promoted."""
    from perdure.curriculum import learn as learn_skills
    from perdure.report.html import write_report
    from perdure.report.numbers import summary
    from perdure.report.text import render

    extra = [f'train.method="{method}"'] if method else []
    extra += [] if repair is None else [f"gate.repair={6 if repair else 0}"]
    place, config = _open(workspace, [*extra, *(settings or [])])
    with place.lock():
        outcomes = learn_skills(place, skills, config, _reporter(), force=force, restart=restart)
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
    from perdure.models import compute_dtype, matmul_peak
    from perdure.report.profile import profile
    from perdure.report.text import profile_table

    peak = matmul_peak(compute_dtype(config.model))
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

    place, config = _open(workspace, settings)
    result = evaluate_version(place, version, skill or [], config, probe, _reporter())
    if as_json:
        out.print_json(json.dumps(result))
    else:
        score_table(result, out)


@app.command()
def status(workspace: WorkspaceArgument = HERE, as_json: JsonOption = False) -> None:
    """The champion, its skills, and anything unfinished."""
    place, _ = _open(workspace, None)
    unfinished = place.unfinished()
    state = {**place.aliases(), "skills": list(place.taught()), "unfinished": unfinished}
    if as_json:
        out.print_json(json.dumps(state))
        return
    out.print(f"champion  {state['champion']}   previous  {state['previous'] or '-'}")
    out.print(f"skills    {', '.join(state['skills']) or 'none taught yet'}")
    for stage in unfinished:
        out.print(f"unfinished stage {stage}: repeat the learn command to go on with it")


@app.command()
def log(workspace: WorkspaceArgument = HERE, as_json: JsonOption = False) -> None:
    """The ledger: every event, oldest first; what each stage was predicted to cost, and did. A broken chain is an
    error."""
    place, _ = _open(workspace, None)
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
def verify(workspace: WorkspaceArgument = HERE, as_json: JsonOption = False) -> None:
    """Check every byte of versions, skills and ledger against what was written. Exit code 2: something was changed."""
    from perdure.report.text import safe_text
    from perdure.verify import verify as problems_of_workspace

    if not (workspace / "perdure.toml").is_file():
        raise InputError(f"{workspace}: not a workspace (no perdure.toml)")
    with _reporter().phase("verify", 0, "folders") as phase:
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
    """A version's record: parent, skill, scores, verdict, hashes, cost (JSON)."""
    place, _ = _open(workspace, None)
    out.print_json(json.dumps(place.version(version)))


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="v3, champion, previous or candidate.")] = "previous",
    second: Annotated[str, typer.Argument(help="The same.")] = "champion",
    workspace: WorkspaceOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Two versions side by side: every score on the same items, and the settings that differ."""
    from perdure.compare import compare
    from perdure.report.text import diff_tables

    place, _ = _open(workspace, None)
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
    place, _ = _open(workspace, None)
    if force and not (reason or "").strip():
        raise InputError("--force needs --reason: the ledger keeps why the gate was overruled")
    with place.lock():
        name = place.resolve(version)
        verdict = place.verdict(name)
        passed = verdict is None or verdict["decision"] == "promoted"
        if verdict and not passed and not force:
            words = f"{name} was {verdict['decision']} by the gate: {verdict['reasons'][0]} To serve it all the same: "
            out.print(Text(f'{words}perdure promote {name} --force --reason "..."'), soft_wrap=True)
            raise typer.Exit(REFUSED)
        place.promote(name, reason or "by hand", **({} if passed else {"forced": True}))
    out.print(f"champion: {name}")


@app.command()
def forget(
    skill: Annotated[str, typer.Argument(help="Name of a skill that the champion was taught.")],
    workspace: WorkspaceOption = HERE,
    settings: SetOption = None,
) -> None:
    """Take a skill out: replay the chain without it, gate the result, promote it. Exit code 1: not promoted."""
    from perdure.forgetting import forget as forget_skill
    from perdure.report.html import write_report

    place, config = _open(workspace, settings)
    with place.lock():
        done = forget_skill(place, skill, config, _reporter())
        write_report(place.folder)
    out.print(f"{done.skill}: {done.before:.1%} before, {done.after:.1%} without it, on {done.n} items")
    for reason in done.reasons:
        out.print(Text(reason), soft_wrap=True)
    verb = "is the champion" if done.decision == "promoted" else f"was {done.decision}; the champion stays"
    out.print(f"{done.version} {verb}")
    raise typer.Exit(0 if done.decision == "promoted" else REFUSED)


@app.command()
def rollback(
    workspace: WorkspaceOption = HERE,
    to: Annotated[str | None, typer.Option(help="Version to go back to; default: the champion's parent.")] = None,
) -> None:
    """Go back to an earlier version. No weights are moved: it takes no time."""
    place, _ = _open(workspace, None)
    with place.lock():
        out.print(f"champion: {place.rollback(to)}")


@app.command()
def sync(
    tracker: Annotated[str, typer.Argument(help="mlflow.")],
    workspace: WorkspaceOption = HERE,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow's; default: an SQLite file in the workspace.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of experiment and registered model; default: the folder's.")] = None,
) -> None:
    """Mirror versions, scores and aliases into a tracker. The workspace stays the truth; repeating it adds nothing."""
    from perdure.trackers import sync_mlflow

    if tracker != "mlflow":
        raise InputError(f"no tracker {tracker!r}; there is: mlflow")
    place, _ = _open(workspace, None)
    mirror = sync_mlflow(place, tracking_uri, name)
    out.print(f"{mirror.uri}: {len(mirror.added)} versions added to {mirror.model}", soft_wrap=True)
    for alias, version in mirror.aliases.items():
        out.print(f"{alias}: {version}")


@app.command()
def report(
    workspace: WorkspaceArgument = HERE,
    as_json: JsonOption = False,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write report.html; with --json print its numbers instead."""
    from perdure.report.html import write_report
    from perdure.report.numbers import summary

    place, _ = _open(workspace, None)
    if as_json:
        out.print_json(json.dumps(summary(place.folder)))
        return
    path = write_report(place.folder)
    out.print(str(path), soft_wrap=True)
    if open_it:
        webbrowser.open(path.resolve().as_uri())


def _reporter() -> Any:
    from perdure.progress import ConsoleReporter

    return ConsoleReporter(err)


def _open(folder: Path, settings: list[str] | None) -> tuple[Workspace, RunConfig]:
    from perdure.workspace import Workspace

    place = Workspace.open(folder)
    return place, with_settings(place.config(), settings or [])


if __name__ == "__main__":
    main()
