"""Prior capabilities: what the model could do before it was taught anything, measured through lm-eval.

The same seed probes the same items of every version, so two versions can be compared item by item.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from perdure.files import package_file
from perdure.probe_tasks import DATA_FOLDER, DATA_PACKAGE, LOCAL_TASKS, Item, local_items, sample_indices
from perdure.stats import wilson_interval
from perdure.types import InputError

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ACCURACIES = ("acc_norm", "acc", "exact_match", "pass@1")
"""Metrics that say right or wrong of each item, the preferred one first; for tasks that are not local."""


@dataclass(frozen=True)
class TaskScore:
    """Accuracy on one task."""

    accuracy: float
    """Share of items answered right, 0..1."""
    low: float
    """Lower end of the 95 % Wilson interval."""
    high: float
    n: int
    metric: str
    """lm-eval's name of the metric that decides whether an item is right."""


@dataclass(frozen=True)
class ProbeResult:
    """Prior capabilities of one version."""

    average: float
    """Unweighted mean of the tasks' accuracies."""
    tasks: dict[str, TaskScore]
    items: list[dict[str, Any]]
    """``{"task", "id", "correct"}``; ids are stable across versions."""
    tokens: int
    """Tokens that the model processed."""


@dataclass(frozen=True)
class _Plan:
    """A task by its configured name, as lm-eval tasks (several for a group) and the items to take of each."""

    members: dict[str, Task]
    samples: dict[str, list[int]]
    metric: str | None


def probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    rows: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    key: int = 0,
) -> ProbeResult:
    """Accuracy of ``model`` (in its compute dtype, in eval mode) on ``rows`` items of each task.

    ``progress`` is called with the tokens done and the tokens in all. ``key``: of the model's session, where several
    processes share the scoring. Raises InputError for an unknown task, for data
    that cannot be had, and where lm-eval or the data package is missing; nothing is measured then.
    """
    if not tasks:
        raise InputError("no tasks to probe: set [probe] tasks")
    check_tasks(tasks)
    from lm_eval.evaluator import evaluate

    from perdure.lm import ProbedModel

    lm = ProbedModel(model, tokenizer, progress=progress, key=key)
    with _quiet():
        plans = {name: _plan(name, rows, seed) for name in dict.fromkeys(tasks)}
        members = {key: task for plan in plans.values() for key, task in plan.members.items()}
        samples = {key: indices for plan in plans.values() for key, indices in plan.samples.items()}
        found = evaluate(lm, {"tasks": members}, samples=samples, bootstrap_iters=0)
    assert found is not None
    # By lm-eval's types a run may keep no samples; this one asked for them.
    answers: Any = found.get("samples")
    return _result(plans, answers, lm.tokens)


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises InputError for an unknown task, and where lm-eval or a local task's data are missing. It takes a moment:
    what is wrong with the tasks should be said before anything is computed."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise InputError("the probe needs lm-eval, which is not installed: pip install 'lm-eval>=0.4.13,<0.5'")
    for name in tasks:
        for path, sha256 in LOCAL_TASKS[name].files.values() if name in LOCAL_TASKS else ():
            package_file(DATA_PACKAGE, DATA_FOLDER, path, sha256)
    if others := [name for name in tasks if name not in LOCAL_TASKS]:
        from lm_eval.tasks import TaskManager

        known = TaskManager().all_tasks
        for name in others:
            if name not in known:
                raise _unknown(name)


def _unknown(name: str) -> InputError:
    local = ", ".join(LOCAL_TASKS)
    return InputError(
        f"[probe] tasks: {name!r} is neither a local task ({local}) nor one of lm-eval's (lm-eval ls tasks lists them)"
    )


def _plan(name: str, rows: int, seed: int) -> _Plan:
    if name in LOCAL_TASKS:
        items = local_items(name, rows, seed)
        task = _local_task(name, items)
        return _Plan({name: task}, {name: list(range(len(items)))}, LOCAL_TASKS[name].metric)
    members = _load_from_lm_eval(name)
    sizes = {key: len(task.eval_docs) for key, task in members.items()}
    pool = [(key, index) for key, size in sizes.items() for index in range(size)]
    samples: dict[str, list[int]] = {}
    for position in sample_indices(len(pool), rows, seed, name):
        key, index = pool[position]
        samples.setdefault(key, []).append(index)
    return _Plan({key: members[key] for key in samples}, samples, None)


def _local_task(name: str, items: Sequence[Item]) -> Task:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    contexts_vary = any(item.ending for item in items)
    docs = Dataset.from_list(
        [
            {
                "id": item.id,
                "query": item.query,
                "choices": list(item.choices),
                "gold": item.gold,
                "ending": item.ending,
            }
            for item in items
        ]
    )
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"validation": docs},
            "validation_split": "validation",
            "output_type": "multiple_choice",
            "num_fewshot": 0,
            "doc_to_text": "gold" if contexts_vary else "query",
            "doc_to_target": "ending" if contexts_vary else "gold",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": LOCAL_TASKS[name].metric, "aggregation": "mean", "higher_is_better": True}],
        }
    )


def _load_from_lm_eval(name: str) -> dict[str, Task]:
    """A task, group or tag of lm-eval's own; its data come from the hub."""
    from lm_eval.tasks import TaskManager

    try:
        loaded = TaskManager().load(name)["tasks"]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"[probe] tasks: {name!r} cannot be loaded ({reason}); it needs the Hugging Face hub or a filled cache. "
            f"These need no network: {', '.join(LOCAL_TASKS)}"
        ) from error
    # Keys of our own, so that the same leaf may belong to two configured names.
    return {f"{name}:{key}" if key != name else name: task for key, task in loaded.items()}


def _result(plans: dict[str, _Plan], samples: dict[str, list[dict[str, Any]]], tokens: int) -> ProbeResult:
    scores: dict[str, TaskScore] = {}
    items: list[dict[str, Any]] = []
    for name, plan in plans.items():
        answers = [(_id(name, key, answer), answer) for key in plan.members for answer in _first_filter(samples[key])]
        metric = plan.metric or _accuracy_of(name, [answer for _, answer in answers])
        right = [bool(answer[metric] == 1) for _, answer in answers]
        items += [{"task": name, "id": id_, "correct": ok} for (id_, _), ok in zip(answers, right, strict=True)]
        low, high = wilson_interval(sum(right), len(right))
        scores[name] = TaskScore(sum(right) / len(right), low, high, len(right), metric)
    average = sum(score.accuracy for score in scores.values()) / len(scores)
    return ProbeResult(average, scores, items, tokens)


def _first_filter(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A task with several filters repeats its items once for each: the first filter counts."""
    return [answer for answer in answers if answer["filter"] == answers[0]["filter"]]


def _id(name: str, key: str, answer: dict[str, Any]) -> str:
    """Stable across versions: a local item's own id, else lm-eval's number, with the task's name inside a group."""
    if name in LOCAL_TASKS:
        return answer["doc"]["id"]
    leaf = key.removeprefix(f"{name}:")
    return str(answer["doc_id"]) if leaf == name else f"{leaf}/{answer['doc_id']}"


def _accuracy_of(name: str, answers: list[dict[str, Any]]) -> str:
    for metric in ACCURACIES:
        if all(answer.get(metric) in (0, 1) for answer in answers):
            return metric
    raise InputError(
        f"[probe] tasks: {name!r} does not say right or wrong of each item (its metrics: "
        f"{', '.join(answers[0]['metrics'])}; wanted: one of {', '.join(ACCURACIES)})"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no log lines of lm-eval and datasets; they report through ``progress`` or an exception."""
    import datasets
    import lm_eval.api.task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    with ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if datasets.are_progress_bars_disabled() is False:
            stack.callback(datasets.enable_progress_bars)
        datasets.disable_progress_bars()
        # This bar of lm-eval's has no switch.
        stack.enter_context(mock.patch.object(lm_eval.api.task, "tqdm", lambda iterable, **_: iterable))
        yield
