"""From runs to numbers: each method's means with 95 % intervals over runs and items, and paired differences.

Runs (an order with a seed) are few, so what they scatter goes into an interval by Student's t; what the items scatter,
which all runs share, by a bootstrap: a resample draws items for each skill and prior task, the same ones for every
method and run, so that differences are paired. The two are added as variances. With one run there are only items. Items
that are not independent (turns of one conversation, rows with the same prompt) are drawn together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from perdure import retention

Array = NDArray[np.float64]
Units = Sequence[NDArray[np.intp]]
"""The places of the items of each unit, that is of those that are drawn together."""
Result = dict[str, Any]
Metrics = Mapping[str, float]
"""Metric -> value of one run."""
METRICS = ("learned", "final", "retention", "forgetting", "backward_transfer", "forward_transfer", "prior_change",
           "drift", "minutes", "tokens")  # fmt: skip
"""What a row shows. Accuracies 0..1; drift in nats a token; minutes and tokens of training, whole chain. ``retention``
here is what is left of all earlier skills together, the sum of their accuracies at the end over that when learned: a
mean of ratios would be ruled by a skill that was hardly learned."""
OF_ITEMS = METRICS[:7]
"""Those that the items scatter; of the others one run says nothing of how they scatter."""
PAIRED = ("learned", "final", "retention", "prior_change")
RESAMPLES = 1000


def summarise(results: Sequence[Result], base: dict[str, Any], reference: str, seed: int = 0) -> dict[str, Any]:
    """``rows``: method -> metric -> (mean, low, high), None where not measured (low and high alone, where nothing says
    how it scatters); ``differences`` to ``reference`` over the runs that both have; ``skills``: method -> skill ->
    accuracy when learned and at the end; ``growth`` and ``calibration``."""
    methods = list(dict.fromkeys(result["method"] for result in results))
    runs = list(dict.fromkeys((result["order"], result["seed"]) for result in results))
    found = {(r["method"], r["order"], r["seed"]): _decoded(r) for r in results}
    prior = {task: _bits(bits) for task, bits in base["probe"].items()}
    whole = {name: _bits(bits) for name, bits in base["skills"].items()}
    units = {name: _units(base["units"][name]) for name in whole} if "units" in base else {}  # older files have none
    rng = np.random.default_rng(seed)
    samples: dict[str, list[list[Metrics]]] = {method: [] for method in methods}
    paired: dict[str, list[list[Metrics]]] = {method: [] for method in methods if method != reference}
    for draw in [None, *(_draw(rng, whole, units, prior) for _ in range(RESAMPLES))]:
        each = {key: _metrics(run, whole, prior, draw) for key, run in found.items()}
        for method in methods:
            samples[method].append([each[method, *run] for run in runs if (method, *run) in each])
            both = [run for run in runs if (method, *run) in each and (reference, *run) in each]
            if method in paired and both:
                paired[method].append([{metric: each[method, *run][metric] - each[reference, *run][metric]
                                        for metric in PAIRED} for run in both])  # fmt: skip
    return {
        "rows": {method: {"runs": len(samples[method][0]), **_intervals(samples[method], METRICS)}
                 for method in methods},
        "differences": {method: _intervals(values, PAIRED) for method, values in paired.items() if values},
        "skills": {method: _by_skill([r for r in results if r["method"] == method]) for method in methods},
        "growth": {method: growth([r for r in results if r["method"] == method]) for method in methods},
        "calibration": calibration(results),
        "base": {"skills": {name: float(bits.mean()) for name, bits in whole.items()},
                 "prior": _average(prior), "items": {name: len(bits) for name, bits in whole.items()}},
    }  # fmt: skip


def growth(results: Sequence[Result]) -> list[dict[str, float | None]]:
    """By number of skills taught, mean over runs: accuracy on all of them (``average``), retention of the first skill
    and of all earlier ones, seconds of training and of everything else in the stage."""
    places: list[dict[str, float | None]] = []
    for place in range(max(len(result["stages"]) for result in results)):
        stages = [result["stages"][: place + 1] for result in results if len(result["stages"]) > place]
        taught = [[stage for stage in run[:-1] if stage["skill"] in run[-1]["scores"]] for run in stages]
        now = [
            [run[-1]["scores"][stage["skill"]] for stage in known] for run, known in zip(stages, taught, strict=True)
        ]
        learned = [[float(_bits(stage["learned"]).mean()) for stage in known] for known in taught]
        pairs = list(zip(now, learned, strict=True))
        train = [run[-1]["seconds"].get("train", 0.0) for run in stages]
        places.append({
            "skills": place + 1,
            "average": _nan_mean([_average_of(run) for run in stages]),
            "first": _nan_mean([_left(end[:1], begin[:1]) for end, begin in pairs]),
            "earlier": _nan_mean([_left(end, begin) for end, begin in pairs]),
            "train": float(np.mean(train)),
            "rest": float(np.mean([sum(run[-1]["seconds"].values()) for run in stages]) - np.mean(train)),
        })  # fmt: skip
    return places


def _average_of(run: Sequence[dict[str, Any]]) -> float:
    """Mean accuracy after a run's last stage on the skills of all of them that were measured then."""
    scores = run[-1]["scores"]
    return float(np.mean([scores[stage["skill"]] for stage in run if stage["skill"] in scores] or [np.nan]))


def _left(now: Sequence[float] | Array, learned: Sequence[float] | Array) -> float:
    """The sum of the accuracies now over that when learned; NaN where nothing was."""
    return float(np.sum(now) / np.sum(learned)) if np.sum(learned) > 0 else float("nan")


def _nan_mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def calibration(results: Sequence[Result]) -> dict[str, Any] | None:
    """Predicted against realised gain over all stages that had a preflight: Spearman's rank correlation and the points.

    None with fewer than three such stages."""
    points = [
        {"method": r["method"], "skill": s["skill"], "gap": s["preflight"]["gap"],
         "gain": float(_bits(s["learned"]).mean() - _bits(s["before"]).mean())}
        for r in results for s in r["stages"] if s["preflight"]
    ]  # fmt: skip
    if len(points) < 3:
        return None
    gaps, gains = [p["gap"] for p in points], [p["gain"] for p in points]
    spread = len(set(gaps)) > 1 and len(set(gains)) > 1
    test = stats.spearmanr(gaps, gains) if spread else None
    return {"n": len(points), "points": points, "rank_correlation": float(test.statistic) if test else None,  # type: ignore[union-attr]
            "p_value": float(test.pvalue) if test else None}  # type: ignore[union-attr]  # fmt: skip


def _decoded(result: Result) -> dict[str, Any]:
    stages = [stage | {key: _bits(stage[key]) for key in ("before", "learned", "final")} for stage in result["stages"]]
    return {"stages": stages, "probe": {task: _bits(bits) for task, bits in result["probe"].items()},
            "drift": result["drift"]}  # fmt: skip


def _units(numbers: Sequence[int]) -> Units | None:
    """None where each item is a unit; ``numbers``: the unit of each."""
    count = 1 + max(numbers)
    return [np.flatnonzero(np.equal(numbers, unit)) for unit in range(count)] if count < len(numbers) else None


def _draw(rng: np.random.Generator, skills: Mapping[str, Array], units: Mapping[str, Units | None],
          prior: Mapping[str, Array]) -> dict[str, Any]:  # fmt: skip
    def items(name: str, count: int) -> NDArray[np.intp]:
        groups = units.get(name)
        if groups is None:
            return rng.integers(count, size=count)
        return np.concatenate([groups[place] for place in rng.integers(len(groups), size=len(groups))])

    return {
        "items": {name: items(name, len(bits)) for name, bits in skills.items()},
        "prior": {task: rng.integers(len(bits), size=len(bits)) for task, bits in prior.items()},
    }


def _metrics(run: dict[str, Any], base: Mapping[str, Array], prior: Mapping[str, Array],
             draw: dict[str, Any] | None) -> dict[str, float]:  # fmt: skip
    """The metrics of one run on the drawn items."""

    def mean(bits: Array, kind: str, name: str) -> float:
        return float(bits.mean() if draw is None else bits[draw[kind][name]].mean())

    stages, count = run["stages"], len(run["stages"])
    matrix, at = np.full((count + 1, count), np.nan), list(range(1, count + 1))
    for place, stage in enumerate(stages):
        name = stage["skill"]
        matrix[0, place] = mean(base[name], "items", name)
        if place:
            matrix[place, place] = mean(stage["before"], "items", name)
        matrix[place + 1, place] = mean(stage["learned"], "items", name)
        matrix[count, place] = mean(stage["final"], "items", name)
    earlier = retention.forgetting(matrix, at)[:-1]
    changes = [mean(bits, "prior", task) - mean(prior[task], "prior", task) for task, bits in run["probe"].items()]
    seconds = sum(stage["seconds"].get("train", 0.0) for stage in stages)
    return {
        "learned": float(retention.accuracy_when_learned(matrix, at).mean()),
        "final": retention.average_accuracy(matrix),
        "retention": _left(retention.final_accuracy(matrix)[:-1], retention.accuracy_when_learned(matrix, at)[:-1]),
        "forgetting": float(earlier.mean()) if len(earlier) else float("nan"),
        "backward_transfer": retention.backward_transfer(matrix, at),
        "forward_transfer": retention.forward_transfer(matrix, at),
        "prior_change": float(np.mean(changes)) if changes else float("nan"),
        "drift": run["drift"],
        "minutes": seconds / 60,
        "tokens": float(sum(sum(stage["tokens"].values()) for stage in stages)),
    }


def _intervals(samples: Sequence[Sequence[Metrics]], metrics: Sequence[str]) -> dict[str, Any]:
    """(mean over runs, low, high) of each metric; ``samples``: the runs' metrics on all items, then on drawn ones."""
    found: dict[str, Any] = {}
    for metric in metrics:
        runs = [value for run in samples[0] if not np.isnan(value := run[metric])]
        if not runs:
            found[metric] = None
            continue
        mean = float(np.mean(runs))
        drawn = [_nan_mean([run[metric] for run in draw]) for draw in samples[1:]]
        by_items = np.array([value for value in drawn if value is not None])
        if len(runs) == 1:  # an end of the items' own spread may be nearer than the other
            ends = np.percentile(by_items, [2.5, 97.5]) if np.ptp(by_items) > 0 or metric in OF_ITEMS else (None, None)
            found[metric] = [mean, *(None if end is None else float(end) for end in ends)]
            continue
        by_runs = stats.t.ppf(0.975, len(runs) - 1) * np.std(runs, ddof=1) / np.sqrt(len(runs))
        half = float(np.hypot(by_runs, 1.96 * np.std(by_items)))
        found[metric] = [mean, mean - half, mean + half]
    return found


def _by_skill(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    cells: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for stage in result["stages"]:
            cell = cells.setdefault(stage["skill"], {"learned": [], "final": []})
            for key in cell:
                cell[key].append(float(_bits(stage[key]).mean()))
    return {skill: {key: float(np.mean(values)) for key, values in cell.items()} for skill, cell in cells.items()}


def _average(prior: Mapping[str, Array]) -> float | None:
    return float(np.mean([bits.mean() for bits in prior.values()])) if prior else None


def _bits(text: str) -> Array:
    return np.array([letter == "1" for letter in text], dtype=np.float64)
