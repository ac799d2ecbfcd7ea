"""The command line: its frozen surface, its exit codes, and one clear message for every kind of bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fake_workspace import FakeWorkspace
from fakes import COLOURS, save_tiny_model, toy_skill
from perdure.cli import ORDER, app
from perdure.config import load_config
from perdure.types import InputError
from perdure.workspace import Workspace

SURFACE = {
    "demo": {"--workspace", "-w", "--compare"},
    "init": {"workspace", "--model", "--config", "--set"},
    "import": {
        "source",
        "target",
        "--file",
        "--questions",
        "--ask",
        "--ask-model",
        "--pretest",
        "--save-questions",
        "--model",
        "--workspace",
        "-w",
        "--grader",
        "--grader-option",
        "--test-share",
        "--turns",
        "--skip-bad",
        "--seed",
    },
    "check": {"--hardware", "skills", "--workspace", "-w", "--method", "--set", "--json"},
    "learn": {
        "skills",
        "--workspace",
        "-w",
        "--method",
        "--set",
        "--force",
        "--restart",
        "--profile",
        "--repair",
        "--no-repair",
        "--json",
    },
    "eval": {"--workspace", "-w", "--version", "--skill", "--probe", "--set", "--json"},
    "status": {"workspace", "--workspace", "-w", "--json"},
    "log": {"workspace", "--workspace", "-w", "--json"},
    "verify": {"workspace", "--workspace", "-w", "--json"},
    "show": {"version", "--workspace", "-w"},
    "diff": {"first", "second", "--workspace", "-w", "--json"},
    "promote": {"version", "--workspace", "-w", "--reason", "--force"},
    "forget": {"skill", "--workspace", "-w", "--set", "--restart"},
    "prune": {"--workspace", "-w", "--yes", "--reason"},
    "erase": {"skill", "--workspace", "-w", "--yes", "--reason"},
    "sync": {"tracker", "--workspace", "-w", "--tracking-uri", "--name"},
    "rollback": {"--workspace", "-w", "--to", "--reason"},
    "report": {"workspace", "--workspace", "-w", "--json", "--open"},
    "chat": {"prompt", "--workspace", "-w", "--version", "--skill", "--system", "--temperature", "--max-new-tokens"},
    "export": {"version", "folder", "--workspace", "-w", "--adapter", "--since", "--rank", "--dtype", "--json"},
    "bench": {"chain", "--out", "--jobs", "--method", "--seed", "--tables", "--json"},
}
"""Every command with its arguments and options. A change here is a change of what people have in their scripts."""

FAST = ("--set", "train.steps=12", "--set", "train.warm_start_steps=8", "--set", "train.learning_rate=3e-3",
        "--set", "train.anchor_general_tokens=4", "--set", "train.checkpoint_every=4")  # fmt: skip


def test_the_surface_is_frozen():
    import typer.main

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: {
            option
            for parameter in command.params
            for option in (
                [*parameter.opts, *parameter.secondary_opts]
                if parameter.param_type_name == "option"
                else [parameter.name]
            )
            if option != "--help"
        }
        for name, command in commands.items()
    }
    assert found == SURFACE and tuple(found) == ORDER


def perdure(*words: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment
    command = [sys.executable, "-m", "perdure.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", copies=True)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A workspace as the command makes it, which loads the model: once for all tests, to copy."""
    folder = tmp_path_factory.mktemp("new") / "bot"
    done = perdure("init", folder, "--model", model, "--set", "probe.tasks=[]",
                   "--set", "model.compute_dtype=float32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def bot(tmp_path: Path, new: Path) -> Path:
    return shutil.copytree(new, tmp_path / "bot")


def assert_one_error(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    for part in parts:
        assert part in done.stderr


def assert_refused(words: Sequence[str | Path], *parts: str) -> None:
    """The command's own error, in this process: what becomes of each such error is seen in processes of their own."""
    with pytest.raises(InputError) as caught:
        app([*map(str, words)], standalone_mode=False)
    for part in parts:
        assert part in str(caught.value)


def test_help_and_version_need_no_torch(tmp_path: Path):
    """Nor do the commands that change what is served, or look at it."""
    code = ("import sys, perdure.cli, perdure.verify, perdure.workspace; "
            "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert perdure("--version").stdout.startswith("perdure ")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("train.jsonl:1", "empty")),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', ("train.jsonl:2", "not valid JSON")),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n',
         ("train.jsonl:1", "assistant")),
        (b'{"prompt": "\xff", "completion": "b"}\n', ("train.jsonl:1", "UTF-8")),
        (b'{"prompt": "a", "completion": "b", "lable": 1}\n', ("train.jsonl:1", "lable")),
    ],
)  # fmt: skip
def test_bad_rows_name_file_and_line(bot: Path, tmp_path: Path, content: bytes, parts: tuple[str, ...]):
    skill = toy_skill(tmp_path / "toy")
    (skill / "train.jsonl").write_bytes(content)
    assert_refused(("learn", skill, "-w", bot), *parts)
    assert not (bot / "runs").exists()


def test_bad_input_is_one_error_and_exit_code_2(bot: Path, tmp_path: Path):
    """Of a skill, in bytes that are no text, and of the command's settings."""
    skill = toy_skill(tmp_path / "toy")
    (skill / "train.jsonl").write_bytes(b'{"prompt": "\xff", "completion": "b"}\n')
    assert_one_error(perdure("learn", skill, "-w", bot), 2, "train.jsonl:1", "UTF-8")
    assert not (bot / "runs").exists()
    assert_one_error(perdure("learn", skill, "-w", bot, "--set", "train.stepz=3"), 2, "stepz")


def test_a_prompt_longer_than_the_window_is_named(bot: Path, tmp_path: Path):
    skill = toy_skill(tmp_path / "toy")
    with (skill / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x" * 3000, "completion": "red"}) + "\n")
    line = 5 * len(COLOURS) + 1
    assert_refused(("check", skill, "-w", bot), f"train.jsonl:{line}", "window")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"grader": "vibes"}, ("skill.toml", "vibes", "exact")),
        ({"max_new_tokens": 0}, ("skill.toml", "max_new_tokens")),
        ({"colour": "red"}, ("skill.toml", "colour")),
    ],
)
def test_bad_skill_settings_are_named(bot: Path, tmp_path: Path, change: dict, parts: tuple[str, ...]):
    assert_refused(("learn", toy_skill(tmp_path / "toy", **change), "-w", bot), *parts)


def test_init_from_a_settings_file(tmp_path: Path, model: Path):
    file = tmp_path / "settings.toml"
    file.write_text("[train]\nsteps = 77\nlora_rank = 8\n")
    done = perdure("init", tmp_path / "bot", "--model", model, "--config", file, "--set", "train.lora_rank=4")
    assert done.returncode == 0, done.stderr
    assert Workspace.open(tmp_path / "bot").config().model.source == str(model)
    train = Workspace.open(tmp_path / "bot").config().train
    assert (train.steps, train.lora_rank) == (77, 4)
    assert_refused(("init", tmp_path / "new", "--config", tmp_path / "none.toml"), "none.toml")
    file.write_text("[train]\nsteps = 0\n")
    assert_refused(("init", tmp_path / "new", "--config", file), "settings.toml", "steps")
    assert not (tmp_path / "new").exists()


RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("**/*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_is_settings_that_can_be_used(recipe: Path):
    assert load_config(recipe).train.steps > 0


def test_a_model_folder_that_is_no_model(tmp_path: Path):
    (tmp_path / "model").mkdir()
    assert_refused(("init", tmp_path / "bot", "--model", tmp_path / "model"), "not a model folder", "config.json")
    assert not (tmp_path / "bot").exists()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert_one_error(perdure("init", tmp_path / "bot", "--model", tmp_path / "model"), 2, "cannot be loaded")
    assert not (tmp_path / "bot").exists()


@pytest.mark.parametrize(
    ("setting", "part"),
    [("train.stepz=3", "stepz"), ("train.steps", "key=value"), ("trian.steps=3", "trian"), ("train.steps=-1", "steps")],
)
def test_bad_settings_are_named(bot: Path, tmp_path: Path, setting: str, part: str):
    assert_refused(("learn", toy_skill(tmp_path / "toy"), "-w", bot, "--set", setting), part)


def test_unknown_options_workspaces_and_sources(bot: Path, tmp_path: Path):
    assert perdure("learn", "x", "--colour").returncode == 2
    assert_one_error(perdure("status", tmp_path), 2, "not a workspace", "perdure init")
    assert_one_error(perdure("import", "nowhere", tmp_path / "s"), 2, "nowhere", "home-assistant")
    assert_one_error(perdure("show", "v9", "-w", bot), 2, "v9", "v000")
    assert_one_error(perdure("rollback", "-w", bot), 2, "base model")


def test_the_environment_names_a_workspace_where_no_option_does(bot: Path, tmp_path: Path):
    elsewhere = str(tmp_path / "nowhere")
    for words in (("status", "-w", bot), ("status", bot), ("log", "-w", bot)):
        assert perdure(*words, PERDURE_WORKSPACE=elsewhere).returncode == 0
    assert perdure("status", PERDURE_WORKSPACE=str(bot)).returncode == 0
    assert_one_error(perdure("status", PERDURE_WORKSPACE=elsewhere), 2, "not a workspace")
    assert_refused(("status", bot, "-w", elsewhere), "two folders are named")


def test_bad_input_that_ends_a_stage_at_once_leaves_none(bot: Path, tmp_path: Path):
    """So that the corrected command is not told to go on with the wrong one."""
    skill = toy_skill(tmp_path / "toy")
    for setting, part in (("probe.tasks=['nope']", "'nope' is neither a local task"),
                          ("model.source=nowhere/at-all", "nowhere/at-all"),
                          ("thinking.enabled=true", "thinking")):  # fmt: skip
        assert_refused(("learn", skill, "-w", bot, "--set", setting), part)
        assert list((bot / "runs").glob("s*")) == []
    assert_refused(("check", skill, "-w", bot, "--set", "probe.tasks=['nope']"), "'nope' is neither a local task")


def test_the_demo_keeps_to_workspaces_of_its_own_and_says_at_once_what_it_cannot_compare(bot: Path, tmp_path: Path):
    assert_refused(("demo", "-w", bot), "not a workspace of this demo", "model.source")
    assert_refused(("demo", "-w", tmp_path / "demo", "--compare", "cpt"), "--compare cpt: no such method")
    assert not (tmp_path / "demo").exists()


def test_a_question_that_is_not_utf8(bot: Path):
    words = [sys.executable, "-m", "perdure.cli", "chat", "-w", str(bot)]
    done = subprocess.run(words, input=b"caf\xe9\n", capture_output=True, check=False)
    assert done.returncode == 2 and b"the question is not UTF-8" in done.stderr and b"Traceback" not in done.stderr


def test_a_terminal_that_cannot_show_what_is_said(held: Path):
    assert perdure("diff", "v1", "v2", "-w", held, PYTHONIOENCODING="ascii").returncode == 0


def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(bot: Path, tmp_path: Path):
    skill = toy_skill(tmp_path / "toy")
    code = (
        "import errno, sys\n"
        "import perdure.workspace as w, perdure.cli as c\n"
        "def full(path, text):\n"
        "    raise OSError(errno.ENOSPC, 'No space left on device', str(path))\n"
        "import perdure.running, perdure.stages\n"
        "perdure.stages.replace_text = perdure.running.replace_text = full\n"
        "c.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "learn", str(skill), "-w", str(bot)],
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert_one_error(done, 2, "No space left on device", "repeat")
    assert json.loads(perdure("status", bot, "--json").stdout)["champion"] == "v000"


def failing_check(bot: Path, tmp_path: Path, part: str, error: str) -> subprocess.CompletedProcess[str]:
    """``perdure check`` of a toy skill, during which one part of perdure.running raises ``error`` (an expression)."""
    code = (
        "import safetensors, torch\n"
        "import perdure.running as r, perdure.cli as c\n"
        "def fails(*args, **settings):\n"
        f"    raise {error}\n"
        f"r.{part} = fails\n"
        "c.main()"
    )
    return subprocess.run([sys.executable, "-c", code, "check", str(toy_skill(tmp_path / "toy")), "-w", str(bot)],
                          capture_output=True, text=True, timeout=300)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.')",
         ("out of memory (CUDA out of memory", "train.micro_batch_tokens", "--hardware")),
        ("RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.')",
         ("out of memory", "train.lora_rank")),
        ("safetensors.SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')",
         ("No space left on device", "repeat")),
    ],
)  # fmt: skip
def test_what_a_library_says_of_the_machine_is_one_error(bot: Path, tmp_path: Path, error: str, parts: tuple[str, ...]):
    done = failing_check(bot, tmp_path, "preflight", error)
    assert_one_error(done, 2, *parts)


def test_what_the_preflight_found_is_said_though_its_forecast_takes_too_much(bot: Path, tmp_path: Path):
    done = failing_check(bot, tmp_path, "forecast", "torch.OutOfMemoryError('CUDA out of memory.')")
    assert done.returncode == 2 and "out of memory (CUDA out of memory)" in done.stderr
    assert re.search(r"Teacher \d+% with .*, student \d+%", done.stderr)


def test_a_fault_of_ours_stays_one(bot: Path, tmp_path: Path):
    done = failing_check(bot, tmp_path, "preflight", "RuntimeError('shapes do not match')")
    assert done.returncode == 4 and "Traceback" in done.stderr


def test_ctrl_c_is_resumable_and_the_resumed_run_has_the_same_bytes(bot: Path, tmp_path: Path, new: Path):
    # Twelve steps are over in half a second.
    longer = (*FAST, "--set", "train.steps=40", "--set", "train.patience=99")
    skill = toy_skill(tmp_path / "toy")
    straight = shutil.copytree(new, tmp_path / "straight")
    assert perdure("learn", skill, "-w", straight, *longer).returncode in (0, 1)

    run = bot / "runs" / "s01-toy"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "perdure.cli", "learn", str(skill), "-w", str(bot), *longer]
    # A shell that runs the tests in the background has them ignore SIGINT, and children inherit that.
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    deadline = time.monotonic() + 200
    while not list(run.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 3, said
    assert "interrupted" in said
    assert "Traceback" not in said
    done = perdure("learn", skill, "-w", bot, *longer)
    assert "Going on with the unfinished stage s01-toy" in done.stderr
    for name in ("metrics.jsonl", "samples.jsonl"):
        ours, theirs = (place / "runs" / "s01-toy" / name for place in (bot, straight))
        assert ours.read_bytes() == theirs.read_bytes()
    assert (bot / "versions/v001/model.safetensors").read_bytes() == (
        straight / "versions/v001/model.safetensors"
    ).read_bytes()


# What the gate held


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """v001 promoted, v002 held."""
    fake = FakeWorkspace(tmp_path / "bot")
    fake.candidate(fake.start("colours"), {"colours": 9}, {"piqa": 60, "boolq": 50})
    fake.candidate(fake.start("numbers"), {"colours": 5, "numbers": 9}, {"piqa": 60, "boolq": 50}, decision="held",
                   reasons=("colours: cannot tell.",))  # fmt: skip
    fake.workspace.hold("v002", reason="colours: cannot tell.")
    return fake.folder


def test_what_the_gate_held_is_promoted_only_by_force_and_with_a_reason(held: Path):
    done = perdure("promote", "candidate", "-w", held)
    assert done.returncode == 1 and "v002 was held by the gate: colours: cannot tell." in done.stdout
    assert "--force --reason" in done.stdout
    assert_one_error(perdure("promote", "v2", "-w", held, "--force"), 2, "--force needs --reason")
    assert json.loads(perdure("status", held, "--json").stdout)["champion"] == "v001"
    assert perdure("promote", "v2", "-w", held, "--force", "--reason", "looked at by hand").returncode == 0
    last = json.loads(perdure("log", held, "--json").stdout)[-1]
    assert (last["event"], last["version"], last["forced"], last["reason"]) == (
        "promote", "v002", True, "looked at by hand")  # fmt: skip


def test_what_was_not_taught_what_the_champion_was_is_promoted_only_by_force(held: Path):
    assert perdure("promote", "v2", "-w", held, "--force", "--reason", "looked at by hand").returncode == 0
    done = perdure("promote", "v001", "-w", held)
    assert done.returncode == 1
    assert "v001 was not taught numbers, which the champion v002 was. To go back to it: perdure rollback --to v001" \
        in done.stdout  # fmt: skip
    assert perdure("rollback", "-w", held, "--to", "v001").returncode == 0
    fake = FakeWorkspace.reopened(Workspace.open(held))
    fake.candidate(fake.start("shapes"), {"colours": 9, "shapes": 9}, {"piqa": 60, "boolq": 50}, parent="v001",
                   promote=False)  # fmt: skip
    done = perdure("promote", "v2", "-w", held, "--reason", "why not")
    assert done.returncode == 1 and "v002 was held" in done.stdout
    assert perdure("promote", "v2", "-w", held, "--force", "--reason", "without shapes").returncode == 0
    done = perdure("promote", "v3", "-w", held)
    assert done.returncode == 1 and "v003 was not taught numbers, which the champion v002 was" in done.stdout
    assert f"perdure promote v003 -w {held} --force --reason" in done.stdout
    assert perdure("promote", "v3", "-w", held, "--force", "--reason", "shapes instead").returncode == 0
    last = json.loads(perdure("log", held, "--json").stdout)[-1]
    assert (last["event"], last["version"], last["forced"]) == ("promote", "v003", True)


def test_what_is_served_can_be_seen_and_changed_whatever_the_settings_say(held: Path):
    """And the ledger says who changed it."""
    with (held / "perdure.toml").open("a") as file:
        file.write("\n[gate2]\nx = 1\n")
    assert perdure("promote", "v2", "-w", held, "--force", "--reason", "by hand").returncode == 0
    assert perdure("rollback", "-w", held, "--reason", "customers complained").returncode == 0
    shown = perdure("log", held)
    assert shown.returncode == 0 and "promote, forced" in shown.stdout
    last = json.loads(perdure("log", held, "--json").stdout)[-1]
    assert (last["event"], last["version"], last["reason"]) == ("rollback", "v001", "customers complained")
    assert "@" in last["by"]
    for words in (("show", "v2", "-w", held), ("diff", "v1", "v2", "-w", held), ("status", held, "--json")):
        assert perdure(*words).returncode == 0


def test_a_record_has_a_later_verdict_beside_its_own(held: Path):
    assert "later_verdict" not in json.loads(perdure("show", "v2", "-w", held).stdout)
    Workspace.open(held).append("verdict", version="v002", decision="promoted", reasons=["colours: kept."])
    shown = json.loads(perdure("show", "v2", "-w", held).stdout)
    assert (shown["verdict"]["decision"], shown["later_verdict"]["decision"]) == ("held", "promoted")


def test_an_altered_version_is_not_promoted(held: Path):
    files = (path for path in (held / "versions" / "v002").rglob("*") if path.is_file())
    weights = next(path for path in sorted(files) if path.name != "version.json")
    weights.write_bytes(weights.read_bytes() + b"x")
    assert_one_error(perdure("promote", "v2", "-w", held, "--force", "--reason", "r"), 2, "altered")
    assert json.loads(perdure("status", held, "--json").stdout)["champion"] == "v001"


def test_diff_compares_on_the_same_items(held: Path, capsys: pytest.CaptureFixture[str]):
    found = json.loads(perdure("diff", "v1", "v2", "-w", held, "--json").stdout)
    assert (found["first"], found["second"], found["between"]) == ("v001", "v002", ["v001", "v002"])
    colours = found["scores"]["colours"]
    assert (colours["before"], colours["after"], colours["lost"], colours["gained"]) == (0.9, 0.5, 4, 0)
    assert colours["p_worse"] == 1 / 16 and colours["low"] <= -0.4 <= colours["high"]
    assert found["scores"]["numbers"] is None and found["config"] == {}
    app(["diff", "v1", "v2", "-w", str(held)], standalone_mode=False)
    text = capsys.readouterr().out
    assert "−40.0" in text and "v001 > v002" in text


def test_what_diff_forget_and_sync_cannot_do(held: Path):
    assert_refused(("diff", "v1", "v9", "-w", held), "no version 'v9'")
    assert_refused(("sync", "wandb", "-w", held), "no tracker 'wandb'")
