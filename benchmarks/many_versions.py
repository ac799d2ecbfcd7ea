"""Opening a large workspace: 500 versions of 50 skills, by the command line.

    python benchmarks/many_versions.py [--versions 500] [--skills 50] [--json FILE]

The versions hold scores and items, no weights. ``many_versions.<command>``: seconds of the whole process, Python's own
start and imports included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import finish, spread

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fake_workspace import FakeWorkspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=500)
    parser.add_argument("--skills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fake = FakeWorkspace(Path(folder) / "bot", n=20)
        for number in range(args.versions):
            stage = fake.start(f"skill{number % args.skills}")
            taught = {f"skill{skill}": 15 for skill in range(min(number + 1, args.skills))}
            fake.candidate(stage, taught, {"piqa": 60, "boolq": 50})
        report: dict[str, Any] = {"versions": args.versions, "skills": args.skills, "many_versions": {}}
        for command in ("--help", "status", "log"):
            report["many_versions"][command] = spread([seconds(command, fake.folder) for _ in range(args.rounds)])
    finish(report, args.json)


def seconds(command: str, folder: Path) -> float:
    words = [sys.executable, "-m", "perdure.cli", command, *([] if command == "--help" else [str(folder)])]
    start = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
