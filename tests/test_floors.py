"""A module imports only what is listed before it: the order of CONTRIBUTING's tree, from top to bottom."""

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "perdure"

# Names below "perdure."; the package itself ("", its version) comes first. A pattern stands for modules that do not
# import each other.
FLOORS = {
    "F0 words": ["", "types", "methods", "settings", "train_config", "config"],
    "F1 math": ["losses", "fused", "ema", "retention", "stats", "seeds", "guidance"],
    "F2 text and weights": [
        "files", "memory", "provenance", "servers", "hub", "processes", "sharding", "thinking", "templates", "contexts",
        "packing", "attention", "batching", "nf4", "stacks", "adapters", "models", "loading", "teacher", "likelihood",
    ],
    "F3 plug-ins": [
        "rollout", "rollout.base", "rollout.sampling", "rollout.draft", "rollout.replay", "rollout.*",
        "skills", "skills.users", "skills.settings", "skills.graders.text", "skills.graders.*", "skills.graders",
        "skills.turns", "skills.reading", "skills.environments", "skills.base", "skills.doubts",
        "importers.base", "importers.bfcl", "importers.tldr", "importers.passages", "importers.*", "importers",
    ],
    "F4 doing": [
        "reporting", "session", "ahead", "episodes", "evaluate", "probe_tasks", "lm", "probe", "checkpoint", "runlog",
        "stage", "rows", "monitor", "update", "scoring", "train", "written", "subject", "preflight", "advisor",
        "anchors", "footprint",
    ],
    "F5 deciding": [
        "gates", "ledger", "run_folders", "skill_folders", "workspace", "verify", "scores", "measure", "compare",
        "stages", "staging", "forecast", "running", "candidate", "repair", "card", "judging", "curriculum",
        "forgetting", "erasing", "pruning", "question_writers", "questions",
    ],
    "F6 talking": [
        "report", "report.profile", "report.record", "report.numbers", "report.words", "report.charts",
        "report.samples", "report.results", "report.process", "report.text", "report.check", "report.html",
        "bench", "bench.plan", "bench.sources", "bench.finished", "bench.chain_run", "bench.runner", "bench.numbers",
        "bench.plots", "bench.tables",
        "export", "chat", "trackers", "progress", "demo", "cli_common", "cli_import", "cli_learn",
        "cli_versions", "cli_changes", "cli_bench", "cli",
    ],
}  # fmt: skip
ORDER = [(floor, pattern) for floor, patterns in FLOORS.items() for pattern in patterns]
FOREIGN = {
    "F0 words": {"pydantic", "tomli_w", "torch"},
    "F1 math": {"torch", "numpy", "scipy"},
}
"""What the lowest floors may import beside the standard library: nothing that loads models or data."""


def modules(package: Path) -> dict[str, Path]:
    """Name below the package -> file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def rank(name: str) -> int | None:
    """The place of a module in the order; its own name before a pattern. None where it is not listed."""
    for place, (_, pattern) in enumerate(ORDER):
        if name == pattern:
            return place
    places = [place for place, (_, pattern) in enumerate(ORDER) if "*" in pattern and fnmatch(name, pattern)]
    # The longest pattern is the nearest one ("skills.graders.*" for a grader).
    return max(places, key=lambda place: len(ORDER[place][1]), default=None)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a file, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def violations(package: Path) -> list[str]:
    """``module:line: what is wrong`` for a package folder."""
    known = modules(package)
    found = [f"{name}: not listed in tests/test_floors.py" for name in known if rank(name) is None]
    for name, path in known.items():
        place = rank(name)
        if place is None:
            continue
        floor = ORDER[place][0]
        for line, target in imports(path):
            where = f"{name or package.name}:{line}"
            if target.startswith("."):
                found.append(f"{where}: relative import; write it from the package's name on")
            elif target.split(".")[0] == package.name:
                inner = target.removeprefix(package.name).removeprefix(".")
                inner = inner if inner in known else inner.rpartition(".")[0]  # else a name inside a module
                other = rank(inner)
                if other is None or other >= place:
                    found.append(f"{where}: imports {inner}, which is not before it")
            elif floor in FOREIGN and not _is_standard(target) and target.split(".")[0] not in FOREIGN[floor]:
                found.append(f"{where}: imports {target}, which {floor} may not")
    return found


def _is_standard(target: str) -> bool:
    return target.split(".")[0] in sys.stdlib_module_names


def test_every_module_is_listed_and_imports_only_what_comes_before_it():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "text", "words"),
    [
        ("types", "from perdure.config import RunConfig", "types:1: imports config, which is not before it"),
        ("gates", "import perdure.workspace", "gates:1: imports workspace"),
        ("losses", "def f():\n    from perdure import contexts", "losses:2: imports contexts"),
        ("seeds", "import os\nfrom transformers import AutoModel", "seeds:2: imports transformers.AutoModel"),
        ("stats", "import lm_eval.api.task", "stats:1: imports lm_eval.api.task"),
        ("rollout/vllm", "from perdure.rollout.local import LocalEngine", "rollout.vllm:1: imports rollout.local"),
        ("skills/graders/new", "from perdure.skills.graders import exact", "skills.graders.new:1: imports"),
        ("train", "from . import checkpoint", "train:1: relative import"),
        ("config", "if TYPE_CHECKING:\n    from perdure.models import load", "config:2: imports models"),
        ("helpers", "", "helpers: not listed"),
        ("report/pie", "", "report.pie: not listed"),
        ("report/text", "from perdure.report import html", "report.text:1: imports report.html"),
    ],
)
def test_the_check_finds_what_it_is_for(tmp_path, module, text, words):
    package = tmp_path / "perdure"
    for name in ("__init__", "contexts", "models", "config", "workspace", "rollout/local", "skills/graders/exact",
                 "skills/graders/__init__", "report/__init__", "report/html", "checkpoint", module):  # fmt: skip
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if name == module else "", encoding="utf-8")
    (found,) = violations(package)
    assert found.startswith(words)


def test_what_is_allowed_stays_allowed(tmp_path):
    package = tmp_path / "perdure"
    texts = {"__init__": "", "types": "import os\nif TYPE_CHECKING:\n    import torch", "losses": "import torch.nn",
             "cli": "from perdure import __version__\nfrom perdure.workspace import Workspace",
             "workspace": "import perdure.types\nimport transformers"}  # fmt: skip
    package.mkdir()
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    assert violations(package) == []
