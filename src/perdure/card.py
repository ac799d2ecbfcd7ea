"""The model card of a version: README.md with Hugging Face's metadata, written from its version.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from perdure.methods import METHODS
from perdure.models import EMBEDDED_HUB_ID
from perdure.workspace import BASE

PAPER = "https://arxiv.org/abs/2601.19897"


def model_card(info: Mapping[str, Any], taught: list[str], below: str | None) -> str:
    """The card as Markdown. ``info`` is a version.json before its files are hashed, ``taught`` the skills in order,
    ``below`` the version on whose weights the folder's adapter lies; None where it holds whole weights."""
    return f"---\n{_metadata(info, below).to_yaml()}\n---\n\n{_text(info, taught, below)}"


def _metadata(info: Mapping[str, Any], below: str | None) -> ModelCardData:
    source = info["config"]["model"]["source"]
    results = [
        _result(skill, "skill", score["skill_hash"], score) for skill, score in info["scores"].items()
    ] + [_result(task, "lm-eval", None, score) for task, score in _tasks(info).items()]  # fmt: skip
    # An adapter on another version is none on the base: whoever goes by this would put it there.
    base = None if below not in (None, BASE) else EMBEDDED_HUB_ID if source == "embedded" else source
    return ModelCardData(
        base_model=base, library_name="peft" if below else "transformers",
        pipeline_tag="text-generation", tags=["perdure", "continual-learning", info["method"]],
        model_name=_name(info), eval_results=results or None,
    )  # fmt: skip


def _name(info: Mapping[str, Any]) -> str:
    return f"perdure-{info['version']}-{info['hashes']['weights'][:8]}"


def _result(name: str, kind: str, revision: str | None, score: Mapping[str, Any]) -> EvalResult:
    # The data set's type tells results apart: those with the same one are shown as several metrics of the first.
    return EvalResult(
        task_type="text-generation", task_name=kind, dataset_type=name, dataset_name=name, dataset_revision=revision,
        dataset_split="test" if kind == "skill" else None, metric_type="accuracy", metric_name="accuracy",
        metric_value=round(score["accuracy"], 4),
    )  # fmt: skip


def _tasks(info: Mapping[str, Any]) -> Mapping[str, Any]:
    return (info["probe"] or {"tasks": {}})["tasks"]


def _text(info: Mapping[str, Any], taught: list[str], below: str | None) -> str:
    verdict, hashes = info["verdict"], info["hashes"]
    lines = [
        f"# {_name(info)}",
        "",
        f"Version {info['version']}, made from {info['parent']} on {info['created']} by teaching it "
        f"**{info['skill']}** with Perdure ({_method(info['method'])}).",
        f"Skills in order: {', '.join(taught)}.",
        "",
        *_form(info["version"], below),
        f"The gate's verdict: **{verdict['decision']}**.",
        "",
        *(f"- {reason}" for reason in verdict["reasons"]),
        "",
        "| Measured on | Accuracy | 95 % interval | Items |",
        "| --- | --- | --- | --- |",
        *_rows(info),
        "",
        "| Lineage | |",
        "| --- | --- |",
        *(f"| {name} sha256 | `{value}` |" for name, value in hashes.items() if isinstance(value, str)),
        *(f"| code {name} | `{value}` |" for name, value in (hashes.get("code") or {}).items()),
        f"| seed | {info['seed']} |",
        "",
        "| Cost | |",
        "| --- | --- |",
        *(f"| {phase} | {value:.0f} s |" for phase, value in info["cost"]["seconds"].items()),
        *(f"| {kind} | {value} tokens |" for kind, value in info["cost"]["tokens"].items()),
        *(f"| {kind} | {value} |" for kind, value in (info["cost"].get("priced") or {}).items()),
    ]
    return "\n".join(lines) + "\n"


def _form(version: str, below: str | None) -> list[str]:
    if below is None:
        return []
    return [f"This folder holds an adapter (peft) on the weights of {below}{' (the base model)' * (below == BASE)}; "
            f"for whole weights: `perdure export {version} FOLDER`.", ""]  # fmt: skip


def _method(name: str) -> str:
    label = METHODS[name].label
    return f"[{label}]({PAPER})" if name == "sdft" else label


def _rows(info: Mapping[str, Any]) -> list[str]:
    named = info["scores"] | {f"prior: {task}": score for task, score in _tasks(info).items()}
    return [
        f"| {name} | {score['accuracy']:.1%} | {score['low']:.1%} to {score['high']:.1%} | {score['n']} |"
        for name, score in named.items()
    ]
