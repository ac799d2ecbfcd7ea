"""Measuring a version on skills and prior capabilities, and its scores as files hold them (scores.py reads them)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perdure.config import RunConfig
from perdure.evaluate import evaluate
from perdure.files import write_jsonl
from perdure.gates import Items
from perdure.models import compute_dtype, device_of
from perdure.probe import ProbeResult, probe
from perdure.reporting import Reporter
from perdure.scores import PROBE, Way
from perdure.session import Session
from perdure.skills.base import Skill
from perdure.skills.graders import contains
from perdure.types import SkillScore


def way_of(config: RunConfig) -> Way:
    """How scores are taken under these settings on this machine. A setting at its default counts as one that was not
    there yet."""
    model = config.model.model_dump(mode="json", exclude_defaults=True, exclude={"trust_remote_code"})
    model |= {"compute_dtype": str(compute_dtype(config.model)), "device": device_of(config.model).type}
    answers = [
        model,
        config.context.student_switches,
        str(config.context.date),
        config.thinking.model_dump(mode="json", exclude_defaults=True),
        config.rollout.engine,
    ]
    prior = [model, config.probe.rows, config.seed]
    return Way(_hash(answers), _hash(prior), config.eval.rows, frozenset(config.probe.tasks))


def _hash(settings: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def measure_skill(session: Session, skill: Skill, config: RunConfig, reporter: Reporter, who: str) -> SkillScore:
    """Greedy answers to the skill's test rows, graded."""
    rows = config.eval.taken(skill.test)
    with reporter.phase(f"evaluate {who} on {skill.name}", len(rows), "rows") as phase:
        return evaluate(
            session.engine, session.renderer, skill.name, rows, skill.grade, skill.settings.max_new_tokens,
            lambda tokens, done: phase.update(done, tokens=tokens), skill.acting,
        )  # fmt: skip


def measure_probe(session: Session, config: RunConfig, reporter: Reporter, who: str) -> ProbeResult | None:
    """Prior capabilities; None when the settings name no task."""
    if not config.probe.tasks:
        return None
    with reporter.phase(f"prior capabilities of {who}", 0, "tokens") as phase:
        before = 0

        def progress(done: int, total: int) -> None:
            nonlocal before
            phase.update(done, total, tokens=done - before)
            before = done

        return probe(
            session.working, session.loaded.tokenizer, tasks=config.probe.tasks, rows=config.probe.rows,
            seed=config.seed, progress=progress, key=session.key,
        )  # fmt: skip


def score_json(score: SkillScore, skill: Skill, way: Way) -> dict[str, Any]:
    """A score without its items, as version.json and baseline.json hold it, with the hashes of what was measured on and
    how; where test rows have a ``metadata.kind``, the accuracy of each kind; where they have a list of texts as
    ``metadata.old``, how many answers give one of these outdated texts."""
    numbers = {key: value for key, value in asdict(score).items() if key not in ("skill", "items")}
    kinds: dict[str, list[bool]] = {}
    changed: list[tuple[bool, bool]] = []
    of_row = {example.id: example.metadata for example in skill.test}
    for item in score.items:
        metadata, right = of_row.get(item.id, {}), item.score >= 1
        if isinstance(kind := metadata.get("kind"), str):
            kinds.setdefault(kind, []).append(right)
        if old := _texts(metadata.get("old")):
            outdated = any(contains.occurs(text, item.completion, whole_words=True) for text in old)
            changed.append((right, not right and outdated))
    found = numbers | {"skill_hash": skill.content_hash, "test_rows": len(skill.test), "measured_with": way.skills}
    if skill.code_hash:
        found["code_hash"] = skill.code_hash
    if kinds:
        found["kinds"] = {kind: {"accuracy": sum(bits) / len(bits), "n": len(bits)} for kind, bits in kinds.items()}
    if changed:
        found["changed"] = {
            "n": len(changed),
            "new": sum(new for new, _ in changed),
            "old": sum(old for _, old in changed),
        }
    return found


def _texts(value: Any) -> list[str]:
    """Metadata is the user's own: what is no list of texts means something else to them."""
    return value if isinstance(value, list) and all(isinstance(text, str) and text for text in value) else []


def probe_json(result: ProbeResult | None, way: Way) -> dict[str, Any] | None:
    tasks = {name: asdict(task) for name, task in result.tasks.items()} if result else {}
    return result and {"average": result.average, "tasks": tasks, "measured_with": way.probe}


def write_items(folder: Path, scores: Sequence[SkillScore], probed: ProbeResult | None) -> None:
    """``<skill>.jsonl`` for each score and ``probe.jsonl``."""
    for score in scores:
        write_jsonl(folder / f"{score.skill}.jsonl", [asdict(item) for item in score.items])
    if probed:
        write_jsonl(folder / f"{PROBE}.jsonl", probed.items)


def skill_items(score: SkillScore) -> Items:
    """A score's items as the gates want them."""
    return {item.id: item.score >= 1 for item in score.items}
