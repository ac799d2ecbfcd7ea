"""New knowledge from documents: accuracy by kind of question, beside what the base model says closed and open book.

Reads the finished runs of ``benchmarks/chains/documents.toml``; measures the base model closed book, with the passage
in its prompt, and as the teacher, with passage and answer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from perdure.config import RunConfig
from perdure.evaluate import score_prompts
from perdure.files import read_json
from perdure.session import Session, open_session
from perdure.skills.base import Skill, load_skill
from perdure.templates import after_reading, parse_template
from perdure.types import Example

KINDS = ("direct", "indirect", "control")
TEMPLATES = ("document", "document_turns:2", "turns:2")
Bits = dict[str, list[bool]]
"""Kind -> right or wrong of each item."""


def by_kind(skill: Skill, right: Sequence[bool]) -> Bits:
    kinds: Bits = {kind: [] for kind in KINDS}
    for example, bit in zip(skill.test, right, strict=True):
        kinds[example.metadata["kind"]].append(bit)
    return kinds


def with_passage(example: Example) -> Example:
    """The question after its passage, as a reader with an open book has it."""
    text = after_reading(str(example.document), example.question)
    return replace(example, messages=(*example.messages[:-1], {"role": "user", "content": text}))


def base_scores(session: Session, skill: Skill) -> dict[str, Bits]:
    """The base model closed book, with the passage, and with passage and answer."""
    renderer = session.renderer
    prompts = {
        "base, closed book": [renderer.student_prompt(e) for e in skill.test],
        "base, passage in the prompt": [renderer.student_prompt(with_passage(e)) for e in skill.test],
        **{f"base as the teacher, {name}": [renderer.teacher_prompt(e, parse_template(name)) for e in skill.test]
           for name in TEMPLATES},
    }  # fmt: skip
    most = skill.settings.max_new_tokens
    found = {}
    for name, asked in prompts.items():
        score = score_prompts(session.engine, renderer, name, asked, skill.grade, most)
        found[name] = by_kind(skill, [item.score >= 1 for item in score.items])
    return found


def of_runs(folder: Path, skill: Skill) -> dict[str, list[Bits]]:
    """Method -> the items of each of its finished runs."""
    found: dict[str, list[Bits]] = {}
    for file in sorted(folder.glob("runs/*/result.json")):
        result = read_json(file)
        (stage,) = result["stages"]
        found.setdefault(result["label"], []).append(by_kind(skill, [bit == "1" for bit in stage["final"]]))
    return found


def interval(runs: Sequence[Sequence[bool]], rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean over runs and items with its 95 % interval, by bootstrap over both."""
    items_RI = np.array(runs, dtype=float)
    count, length = items_RI.shape
    draws = [items_RI[rng.integers(count, size=count)][:, rng.integers(length, size=length)].mean()
             for _ in range(2000)]  # fmt: skip
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(items_RI.mean()), float(low), float(high)


def table(rows: Mapping[str, Sequence[Bits]]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"row": name, "runs": len(runs), **{kind: interval([run[kind] for run in runs], rng) for kind in KINDS}}
            for name, runs in rows.items()]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the bench's folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    skill = load_skill(options.folder / "skills" / "facts")
    base = base_scores(open_session(RunConfig()), skill)
    found = table({name: [bits] for name, bits in base.items()} | of_runs(options.folder, skill))
    print("| | runs | " + " | ".join(KINDS) + " |\n|---|---|" + "---|" * len(KINDS))
    for row in found:
        cells = (f"{100 * row[k][0]:.0f} [{100 * row[k][1]:.0f}, {100 * row[k][2]:.0f}]" for k in KINDS)
        print(f"| {row['row']} | {row['runs']} | " + " | ".join(cells) + " |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
