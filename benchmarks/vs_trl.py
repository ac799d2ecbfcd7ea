"""Perdure's step against TRL's SDFTTrainer: the same weights, prompts, teacher contexts, batch, lengths and threads.

    python benchmarks/vs_trl.py --trl-python .venv-trl/bin/python [--rounds 3] [--states cold trained] [--json FILE]
    python benchmarks/vs_trl.py --long ...      prompts of 800 and more tokens, one round

Both train with forward KL over full logits and a frozen teacher at temperature 1. TRL runs twice a round: at equal
numerics (float32 masters, bfloat16 compute) and at its fastest (weights and optimizer in bfloat16 outright). Each
program has its own process; they alternate. A process's first step warms up and is not counted.
Ratios are TRL's seconds over Perdure's: ``vs_trl.equal_numerics.<state>``, ``vs_trl.fastest.<state>``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import FOLDER, TEMPLATE, finish, load_state, skill, spread

from perdure.config import RunConfig
from perdure.models import save
from perdure.session import open_session
from perdure.skills.base import Skill
from perdure.templates import parse_template

HERE = Path(__file__).parent
NUMERICS = {
    "equal_numerics": {"weights": "float32", "autocast": True},
    "fastest": {"weights": "bfloat16", "autocast": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps a process, the first not counted")
    parser.add_argument("--states", nargs="+", default=["cold", "half", "trained"])
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    batch = args.batch or (4 if args.long else 16)
    taught = long_skill() if args.long else skill()
    settings = {"batch": batch, "steps": args.steps, "max_new_tokens": 28}
    report: dict[str, Any] = {"vs_trl": {}, "seconds": {}, "parts": {}, "tokens": {}, "peak_rss_mb": {}}
    for state in args.states:
        model, rows = prepared(state, taught, settings)
        runs: dict[str, list[dict[str, Any]]] = {"perdure": [], **{name: [] for name in NUMERICS}}
        for _ in range(args.rounds):
            runs["perdure"].append(call(sys.executable, "own_steps.py", model, taught.folder, settings))
            for name, numerics in NUMERICS.items():
                runs[name].append(call(str(args.trl_python), "trl_steps.py", model, rows, settings | numerics))
        record(report, state, runs)
    finish({"batch": batch, "template": TEMPLATE, "max_new_tokens": 28} | report, args.json)


def record(report: dict[str, Any], state: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    seconds = {name: [statistics.median(run["seconds"][1:]) for run in found] for name, found in runs.items()}
    for name in NUMERICS:
        ratios = [trl / own for trl, own in zip(seconds[name], seconds["perdure"], strict=True)]
        report["vs_trl"].setdefault(name, {})[state] = spread(ratios)
    for name, found in runs.items():
        key = f"{'' if name == 'perdure' else 'trl.'}{name}.{state}"
        report["seconds"][key] = spread(seconds[name])
        report["tokens"][key] = statistics.mean(sum(run["tokens"][1:]) / (len(run["tokens"]) - 1) for run in found)
        report["parts"][key] = {
            part: statistics.median(run["parts"][part] for run in found) for part in found[0]["parts"]
        }
        report["peak_rss_mb"][key] = max(run["peak_rss_mb"] for run in found)
        assert len({run["threads"] for runs_ in runs.values() for run in runs_}) == 1, "unequal numbers of threads"


def prepared(state: str, taught: Skill, settings: dict[str, Any]) -> tuple[Path, Path]:
    """A model folder with the state's weights, and the rows as TRL takes them: prompts already rendered."""
    model, rows = FOLDER / "models" / state, FOLDER / f"rows-{taught.name}.jsonl"
    session = open_session(RunConfig())
    if not (model / "config.json").is_file():
        load_state(session, state)
        save(session.loaded, model)
    with rows.open("w", encoding="utf-8") as file:
        for example in taught.train[: settings["batch"] * (settings["steps"] + 1)]:
            prompts = (session.renderer.student_prompt(example),
                       session.renderer.teacher_prompt(example, parse_template(TEMPLATE)))  # fmt: skip
            student, teacher = (session.loaded.tokenizer.decode(prompt.token_ids) for prompt in prompts)
            for text, prompt in zip((student, teacher), prompts, strict=True):
                # TRL tokenizes the text again: that must give the same tokens
                assert tuple(session.loaded.tokenizer(text)["input_ids"]) == prompt.token_ids, example.id
            assert teacher.startswith(student), "the earlier turns begin with the student's whole prompt"
            file.write(json.dumps({"prompt": student, "privileged_context": teacher[len(student) :]}) + "\n")
    return model, rows


def long_skill() -> Skill:
    """The same rows behind a system prompt of some 800 tokens: the list of rooms, say, that every request carries."""
    from perdure.skills.base import load_skill

    source, target = skill().folder, FOLDER / "skills" / "smart-home-long"
    if not target.is_dir():
        target.mkdir(parents=True)
        rooms = ", ".join(f"room {number} on floor {number % 9}" for number in range(130))
        for name in ("train", "test"):
            lines = (source / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = (source / "skill.toml").read_text(encoding="utf-8").replace('"smart-home"', '"smart-home-long"', 1)
        lines = [line for line in text.splitlines() if not line.startswith("system")]
        top = [i for i, line in enumerate(lines) if line.startswith("[")][:1] or [len(lines)]
        lines.insert(top[0], f'system = "Turn the smart-home command into an intent. The house has: {rooms}."')
        (target / "skill.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_skill(target)


def call(python: str, script: str, *arguments: Any) -> dict[str, Any]:
    words = [json.dumps(a) if isinstance(a, dict) else str(a) for a in arguments]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([python, str(HERE / script), *words], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    print(f"{script} {words[-1]}: done", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
