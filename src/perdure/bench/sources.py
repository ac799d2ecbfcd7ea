"""The skill folders of a bench: imported once, and where the chain file asks for it made harder."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import tomli_w

from perdure.bench.plan import Source
from perdure.files import read_jsonl, replace_text
from perdure.importers import IMPORTERS
from perdure.importers.base import write_skill
from perdure.settings import parse_toml


def skill_folder(out: Path, chain_folder: Path, name: str, source: Source) -> Path:
    """The folder of the chain file's skill ``name``; a user's own folder is used as it is where nothing changes it."""
    if source.of not in IMPORTERS and not source.changed:
        return chain_folder / source.of
    target = out / "skills" / name
    if target.is_dir():
        return target
    if not source.changed:
        return _imported(target, name, source.of)
    if source.of in IMPORTERS:
        origin = skill_folder(out, chain_folder, f"{name}-as-it-was", Source(of=source.of))
    else:
        origin = chain_folder / source.of
    settings = parse_toml((origin / "skill.toml").read_bytes(), origin / "skill.toml")
    train = harder(read_jsonl(origin / "train.jsonl"), source, random.Random(f"0/{name}"))
    return write_skill(target, settings | {"name": name}, train, read_jsonl(origin / "test.jsonl"))


def _imported(target: Path, name: str, importer: str) -> Path:
    """The importer's folder as ``target``, under the chain file's name: an importer may have one of its own."""
    beside = target.with_name(f".{name}")
    if beside.is_dir():  # of a run that was stopped here
        shutil.rmtree(beside)
    file = IMPORTERS[importer](beside, 0) / "skill.toml"
    replace_text(file, tomli_w.dumps(parse_toml(file.read_bytes(), file) | {"name": name}))
    return beside.rename(target)


def harder(rows: list[dict[str, Any]], source: Source, rng: random.Random) -> list[dict[str, Any]]:
    """The first ``rows`` training rows; of a share ``noise`` of them, answers in a circle: each gets the next one's."""
    kept = [dict(row) for row in rows[: source.rows]]
    wrong = rng.sample(range(len(kept)), round(source.noise * len(kept)))
    answers = [_answer(kept[place]) for place in wrong]
    for place, answer in zip(wrong, answers[1:] + answers[:1], strict=True):
        _give(kept[place], answer)
    return kept


def _answer(row: dict[str, Any]) -> str:
    return json.dumps(row["messages"][-1] if "messages" in row else row["completion"])


def _give(row: dict[str, Any], answer: str) -> None:
    if "messages" in row:
        row["messages"] = [*row["messages"][:-1], json.loads(answer)]
    else:
        row["completion"] = json.loads(answer)
