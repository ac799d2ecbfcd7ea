"""A workspace mirrored into MLflow (extra ``mlflow``): a run for each version, a registered model with its aliases.

The folder stays the truth. The mirror can be rebuilt at any time, on any server; repeating it adds nothing.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.files import file_sha256, read_jsonl
from perdure.settings import dotted
from perdure.types import InputError
from perdure.workspace import Workspace

KEY = "perdure.version_sha256"
"""Tag of a run and of a model version: the hash of the version's version.json, which holds all other hashes."""
DECISION = "perdure.decision"
"""Tag of both: what the gate said last."""
ALIASES = ("champion", "previous", "candidate")
_BATCH = 1000
"""Most metrics that MLflow takes in one call."""
_LONGEST = 500
"""Characters of a parameter that every MLflow server takes."""


@dataclass(frozen=True)
class Mirror:
    """What a call of ``sync_mlflow`` found and did."""

    uri: str
    experiment: str
    model: str
    added: tuple[str, ...]
    """Versions that were not there yet."""
    aliases: dict[str, str]
    """Alias -> version, as they are now."""


def sync_mlflow(workspace: Workspace, uri: str | None = None, name: str | None = None) -> Mirror:
    """Mirror every version that is not there yet, then set the aliases.

    ``uri``: an MLflow tracking URI, by default an SQLite file in the workspace. ``name``: of the experiment and of the
    registered model, by default the folder's. Raises InputError where MLflow is not installed or cannot be reached."""
    if importlib.util.find_spec("mlflow") is None:
        raise InputError("MLflow is not installed: pip install 'mlflow>=3.17,<4'")
    # What a company teaches its model is its own business; and the sender fails where it cannot reach the network.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    folder = workspace.folder.resolve()
    uri, name = uri or f"sqlite:///{folder / 'mlflow.db'}", name or folder.name
    client: Any = MlflowClient(uri, uri)
    try:
        experiment = _experiment(client, name, folder)
        _registered(client, name)
        runs = _runs(client, experiment)
        there = list(client.search_model_versions(f"name = '{name}'"))
        numbers = {v.tags.get(KEY): v.version for v in there}
        decisions = {v.tags.get(KEY): v.tags.get(DECISION) for v in there}
        added = []
        for version in workspace.versions():
            info = workspace.version(version) | {"verdict": workspace.verdict(version)}
            key = _key(workspace, version)
            if key not in runs:
                runs[key] = _log_run(client, experiment, workspace, info, key)
            if key not in numbers:
                numbers[key] = _register(client, name, workspace, info, key, runs[key])
                added.append(version)
            elif decisions[key] != _decision(info):
                _decide(client, name, info, numbers[key], runs[key])
        aliases = _set_aliases(client, name, workspace, numbers)
    except MlflowException as error:
        raise InputError(f"{uri}: MLflow says: {error}") from error
    return Mirror(uri, name, name, tuple(added), aliases)


def _key(workspace: Workspace, version: str) -> str:
    return file_sha256(workspace.version_folder(version) / "version.json")


def _experiment(client: Any, name: str, folder: Path) -> str:
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name, tags={"perdure.workspace": str(folder)})


def _registered(client: Any, name: str) -> None:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="Versions of a Perdure workspace.")


def _runs(client: Any, experiment: str) -> dict[str, str]:
    """Key -> run of each version whose run was brought to its end."""
    found: dict[str, str] = {}
    token = None
    while True:
        page = client.search_runs([experiment], "attributes.status = 'FINISHED'", page_token=token)
        found |= {run.data.tags[KEY]: run.info.run_id for run in page}
        token = page.token
        if not token:
            return found


def _log_run(client: Any, experiment: str, workspace: Workspace, info: dict[str, Any], key: str) -> str:
    """A run with the version's settings, scores, costs and training curve; it is finished only when all is there."""
    from mlflow.entities import Metric, Param, RunTag

    tags = {
        KEY: key, "perdure.version": info["version"], "perdure.weights": info["hashes"].get("weights", ""),
        "perdure.parent": info["parent"] or "", "perdure.skill": info["skill"] or "",
        "perdure.method": info["method"] or "", DECISION: _decision(info),
    }  # fmt: skip
    run = client.create_run(experiment, tags=tags, run_name=f"{info['version']} {info['skill'] or 'base'}").info.run_id
    card = workspace.version_folder(info["version"]) / "README.md"
    if card.is_file():
        client.log_batch(run, tags=[RunTag("mlflow.note.content", card.read_text(encoding="utf-8"))])
    params = [Param(key, str(value)[:_LONGEST]) for key, value in dotted(info["config"]).items()]
    for start in range(0, len(params), 100):
        client.log_batch(run, params=params[start : start + 100])
    metrics = [Metric(key, value, 0, step) for key, value, step in _metrics(workspace, info)]
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run, metrics=metrics[start : start + _BATCH])
    client.set_terminated(run, "FINISHED")
    return run


def _metrics(workspace: Workspace, info: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
    """(name, value, step): scores and costs at step 0, the training curve at its steps."""
    for skill, score in info["scores"].items():
        yield f"accuracy/{skill}", score["accuracy"], 0
    for task, score in (info["probe"] or {"tasks": {}})["tasks"].items():
        yield f"prior/{task}", score["accuracy"], 0
    if info["probe"]:
        yield "prior_average", info["probe"]["average"], 0
    for kind in ("seconds", "tokens"):
        for part, value in info["cost"][kind].items():
            yield f"cost/{part}_{kind}", float(value), 0
    curve = workspace.run_folder(info["stage"]) / "metrics.jsonl" if info["stage"] else None
    if curve and curve.is_file():
        for line in read_jsonl(curve):
            for key, value in line.items():
                if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                    yield f"train/{key}", float(value), int(line["step"])


def _register(client: Any, name: str, workspace: Workspace, info: dict[str, Any], key: str, run: str) -> str:
    """A version of the registered model. Its source names the folder; MLflow holds no weights."""
    folder = workspace.version_folder(info["version"]).resolve()
    made = client.create_model_version(
        name, source=f"perdure:{folder}", run_id=run, description=_reasons(info),
        tags={KEY: key, "perdure.version": info["version"], DECISION: _decision(info)},
    )  # fmt: skip
    return made.version


def _decide(client: Any, name: str, info: dict[str, Any], number: Any, run: str) -> None:
    """A version that was judged again, under another gate."""
    client.set_tag(run, DECISION, _decision(info))
    client.update_model_version(name, number, _reasons(info))
    client.set_model_version_tag(name, number, DECISION, _decision(info))  # last: by it a repetition finds what is due


def _decision(info: dict[str, Any]) -> str:
    """The gate's, or ``base``."""
    return info["verdict"]["decision"] if info["verdict"] else "base"


def _reasons(info: dict[str, Any]) -> str:
    return " ".join(info["verdict"]["reasons"]) if info["verdict"] else "The base model."


def _set_aliases(client: Any, name: str, workspace: Workspace, numbers: dict[str | None, Any]) -> dict[str, str]:
    wanted = {alias: version for alias, version in workspace.aliases().items() if version}
    there = client.get_registered_model(name).aliases
    for alias in ALIASES:
        if alias in wanted:
            client.set_registered_model_alias(name, alias, numbers[_key(workspace, wanted[alias])])
        elif alias in there:
            client.delete_registered_model_alias(name, alias)
    return wanted
