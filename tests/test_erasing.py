"""Erasing a skill: nothing of its rows is left, what is left can be worked with, and a kill in between is made good."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from fakes import save_tiny_model, toy_skill, two_toy_skills
from perdure.checkpoint import training_state
from perdure.cli import app
from perdure.config import GateConfig, RunConfig
from perdure.curriculum import evaluate_version, learn
from perdure.erasing import erase, what_holds
from perdure.forgetting import forget
from perdure.pruning import prunable, prune
from perdure.report.html import write_report
from perdure.report.numbers import summary
from perdure.reporting import Silent
from perdure.skills.base import load_skill
from perdure.stages import create_workspace
from perdure.types import InputError
from perdure.verify import verify
from perdure.workspace import Workspace


@pytest.fixture(scope="module")
def skills(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("skills")
    return two_toy_skills(folder)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, skills: list[Path]) -> Path:
    """v001 was taught colours, v002 numbers; anchors of colours take part in the second stage."""
    folder = tmp_path_factory.mktemp("learned")
    train = {"method": "sft", "learning_rate": 3e-3, "steps": 12, "warm_start_steps": 6, "anchor_general_tokens": 4}
    config = RunConfig.model_validate(
        {"model": {"source": str(save_tiny_model(folder / "model", copies=True)), "compute_dtype": "float32"},
         "probe": {"tasks": []}, "train": train, "gate": {"enforce": False, "repair": 0}}
    )  # fmt: skip
    learn(create_workspace(folder / "bot", config), skills, config, Silent())
    write_report(folder / "bot")
    return folder / "bot"


@pytest.fixture
def forgotten(tmp_path: Path, learned: Path) -> Workspace:
    """And v003 numbers alone."""
    workspace = Workspace(shutil.copytree(learned, tmp_path / "bot"))
    assert forget(workspace, "colours", workspace.config(), Silent()).version == "v003"
    return workspace


def holds(folder: Path, skill: Path) -> list[str]:
    """Files in which a prompt of the skill stands."""
    loaded = load_skill(skill)
    prompts = {str(example.messages[-1]["content"]).encode() for example in (*loaded.train, *loaded.test)}
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        {path.relative_to(folder).as_posix() for path in files if any(p in path.read_bytes() for p in prompts)}
    )


def test_nothing_of_the_skill_is_left_and_the_rest_is(forgotten: Workspace, skills: list[Path]):
    folder, colours = forgotten.folder, load_skill(skills[0])
    kept = f"skills/colours@{colours.content_hash[:8]}"
    before, others = holds(folder, skills[0]), holds(folder, skills[1])
    wanted = {f"{kept}/{name}" for name in ("train.jsonl", "test.jsonl")}
    wanted |= {"versions/v003/evaluation/colours.jsonl", "runs/s01-colours/baseline/colours.jsonl", "report.html"}
    assert wanted <= {*before}
    assert (forgotten.version_folder("v002") / "model.safetensors").is_file()
    found = erase(forgotten, "colours", by="ann@host", reason="asked to")
    assert found.versions == ("v001", "v002") and found.present == len(found.files) > len(before)
    assert holds(folder, skills[0]) == [] and not (folder / kept).exists()
    of_second_stage = {"runs/s02-numbers/samples.jsonl", "runs/s02-numbers/baseline/numbers.jsonl"}
    assert {*others} - {*holds(folder, skills[1])} <= of_second_stage | {"report.html"}
    weights = [path.parent.name for path in folder.glob("versions/*/model.safetensors")]
    assert weights == ["v003"] and verify(folder) == []
    event = forgotten.ledger()[-1]
    assert (event["event"], event["skill"], event["versions"]) == ("erase", "colours", ["v001", "v002"])
    assert (event["by"], event["reason"]) == ("ann@host", "asked to")


def test_what_is_left_can_be_worked_with(forgotten: Workspace, skills: list[Path]):
    config = forgotten.config()
    erase(forgotten, "colours")
    for refused in (lambda: forgotten.rollback(), lambda: forgotten.rollback("v001"),
                    lambda: evaluate_version(forgotten, "v002", [], config, False, Silent())):  # fmt: skip
        with pytest.raises(InputError, match=r"the weights of v00[12] were erased with the skill 'colours'"):
            refused()
    assert summary(forgotten.folder)["champion"] == "v003"
    for words in (["promote", "v2", "--force", "--reason", "r"], ["export", "v2", str(forgotten.folder / "out")]):
        with pytest.raises(InputError, match="erased"):
            app([*words, "-w", str(forgotten.folder)], standalone_mode=False)
    for words in (["status"], ["log"], ["report"]):
        assert CliRunner().invoke(app, [*words, str(forgotten.folder)]).exit_code == 0
    assert CliRunner().invoke(app, ["diff", "v1", "v3", "-w", str(forgotten.folder)]).exit_code == 0
    (outcome,) = learn(forgotten, skills[:1], config, Silent())  # the same rows, brought again
    assert (outcome.version, outcome.decision) == ("v004", "promoted")
    assert list(forgotten.taught()) == ["numbers", "colours"] and verify(forgotten.folder) == []


def test_a_kill_at_any_file_is_made_good_by_the_same_command(
    forgotten: Workspace, skills: list[Path], monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    unlink, left = Path.unlink, [0]

    def dying(path: Path, missing_ok: bool = False) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", dying)
    for more in (0, 1, 4, 6):
        assert more < len(what_holds(forgotten, "colours").files)
        left[0] = more
        with pytest.raises(Killed):
            erase(forgotten, "colours")
        assert any("to be removed; repeat perdure erase colours" in problem for problem in verify(forgotten.folder))
    monkeypatch.undo()
    erase(forgotten, "colours")
    erase(forgotten, "colours")
    assert holds(forgotten.folder, skills[0]) == [] and verify(forgotten.folder) == []
    assert [event["event"] for event in forgotten.ledger()].count("erase") == 1


def test_what_a_kill_left_out_of_sight_goes_as_well(forgotten: Workspace, skills: list[Path]):
    left = [forgotten.folder / name for name in ("versions/.v009.tmp", "runs/.s09-x.removed", "skills/.x.1.tmp")]
    for folder in left:
        folder.mkdir()
        shutil.copy(skills[0] / "train.jsonl", folder)
    forgotten.hold("v002", reason="to be looked at")
    erase(forgotten, "colours")
    assert holds(forgotten.folder, skills[0]) == [] and not any(folder.exists() for folder in left)
    assert forgotten.aliases()["candidate"] == forgotten.expected_aliases()["candidate"] is None


# Pruning


def test_what_a_served_version_was_made_from_is_not_pruned(forgotten: Workspace):
    """Of a replay a step may have been refused by its own gate; the end was promoted. An adapter may lie on it."""
    forgotten.refuse("v001", reason="a step")
    assert prunable(forgotten).versions == ()
    forgotten.refuse("v002", reason="the end")
    assert prunable(forgotten).versions == ("v001", "v002")


def test_room_is_made_where_nothing_stands_on_the_weights(learned: Path, skills: list[Path], tmp_path: Path):
    """v003 was refused: its weights go, all that is known of it stays, and it is not trained a second time."""
    workspace = Workspace(shutil.copytree(learned, tmp_path / "bot"))
    third = toy_skill(tmp_path / "third", dict.fromkeys(("rain", "snow"), "wet"))
    train = workspace.config().train.model_copy(update={"steps": 1, "warm_start_steps": 1, "learning_rate": 1e-9})
    strict = workspace.config().model_copy(update={"gate": GateConfig(repair=0), "train": train})
    (refused,) = learn(workspace, [third], strict, Silent())
    assert (refused.version, refused.decision) == ("v003", "refused") and prunable(workspace).versions == ("v003",)
    before = {path: path.read_bytes() for path in workspace.folder.rglob("*.json") if path.name != "ledger.head"}
    says = CliRunner().invoke(app, ["prune", "-w", str(workspace.folder)])
    assert says.exit_code == 1 and "The weights of v003" in says.output and prunable(workspace).versions == ("v003",)
    assert CliRunner().invoke(app, ["prune", "-w", str(workspace.folder), "--yes"]).exit_code == 0
    assert "Nothing to prune" in CliRunner().invoke(app, ["prune", "-w", str(workspace.folder)]).output
    assert not list(workspace.version_folder("v003").glob("*.safetensors")) and verify(workspace.folder) == []
    assert all(path.read_bytes() == data for path, data in before.items())
    assert (workspace.ledger()[-1]["event"], workspace.ledger()[-1]["versions"]) == ("prune", ["v003"])
    with pytest.raises(InputError, match="the weights of v003 were removed by perdure prune"):
        evaluate_version(workspace, "v003", [], strict, False, Silent())
    (again,) = learn(workspace, [third], strict, Silent())
    assert again == refused and workspace.versions()[-1] == "v003"
    lax = strict.model_copy(update={"gate": GateConfig(enforce=False, repair=0)})
    (promoted,) = learn(workspace, [third], lax, Silent())  # its weights are gone, so it is trained anew
    assert (promoted.version, promoted.decision) == ("v004", "promoted") and prunable(workspace).versions == ()


def test_a_kill_while_pruning_is_made_good_by_the_same_command(forgotten: Workspace, monkeypatch: pytest.MonkeyPatch):
    """After forgetting, the line of the champion is v000, v003. v002 was promoted once, and may be again."""
    forgotten.promote("v001", "by hand")
    forgotten.promote("v003", "by hand")
    assert prunable(forgotten).versions == ()
    forgotten.hold("v002", reason="to be looked at")
    assert prunable(forgotten).versions == ()
    forgotten.refuse("v002", reason="looked at")
    assert prunable(forgotten).versions == ("v002",)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda self, missing_ok=False: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(forgotten)
    assert any("repeat perdure prune --yes" in problem for problem in verify(forgotten.folder))
    assert prune(forgotten).versions == ("v002",) and verify(forgotten.folder) == []
    assert [event["event"] for event in forgotten.ledger()].count("prune") == 1
    with pytest.raises(InputError, match="removed by perdure prune"):
        forgotten.promote("v002", "by hand")
    assert forgotten.resolve("champion") == "v003"


def test_what_the_ledger_has_no_last_word_on_is_not_pruned(
    learned: Path, skills: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed between its version and its promotion: the next command promotes it."""
    workspace = Workspace(shutil.copytree(learned, tmp_path / "bot"))
    third = toy_skill(tmp_path / "third", dict.fromkeys(("rain", "snow"), "wet"))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("perdure.judging.settle", killed)
        with pytest.raises(KeyboardInterrupt):
            learn(workspace, [third], workspace.config(), Silent())
    assert workspace.versions()[-1] == "v003" and prunable(workspace).versions == ()
    (outcome,) = learn(workspace, [third], workspace.config(), Silent())
    assert (outcome.version, outcome.decision) == ("v003", "promoted")


def test_checkpoints_that_no_command_goes_on_with_are_pruned(
    learned: Path, skills: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    workspace = Workspace(shutil.copytree(learned, tmp_path / "bot"))
    third = toy_skill(tmp_path / "third", dict.fromkeys(("rain", "snow"), "wet"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("perdure.curriculum.judge", Mock(side_effect=KeyboardInterrupt))
        learn(workspace, [third], workspace.config(), Silent())
    (stage,) = workspace.unfinished()
    assert prunable(workspace).stages == () and training_state(workspace.run_folder(stage))
    workspace.rollback()
    assert prunable(workspace).stages == (stage,) and prunable(workspace).size > 0
    says = CliRunner().invoke(app, ["prune", "-w", str(workspace.folder), "--yes"])
    assert says.exit_code == 0 and f"Removed the checkpoints of {stage}" in says.output
    assert not training_state(workspace.run_folder(stage)) and prunable(workspace).stages == ()
    workspace.promote("v002", "back")
    (outcome,) = learn(workspace, [third], workspace.config(), Silent())  # from its first step
    assert outcome.decision == "promoted" and verify(workspace.folder) == []


def test_a_name_is_not_used_twice_though_its_folder_was_removed_by_hand(learned: Path, tmp_path: Path):
    workspace = Workspace(shutil.copytree(learned, tmp_path / "bot"))
    shutil.rmtree(workspace.version_folder("v002"))
    assert workspace.next_version() == "v003"


def test_the_command_says_what_it_would_do_and_does_it_with_yes(forgotten: Workspace, skills: list[Path]):
    words = ["erase", "colours", "-w", str(forgotten.folder)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "the weights of v001, v002. They cannot be brought back: --yes" in done.output
    assert holds(forgotten.folder, skills[0])
    beside = forgotten.folder / "compare" / "sft" / "skills" / f"colours@{'0' * 12}"
    beside.mkdir(parents=True)
    done = CliRunner().invoke(app, [*words, "--yes"])
    assert done.exit_code == 0 and "compare/sft (a workspace of its own" in done.output
    shutil.rmtree(beside)
    assert not holds(forgotten.folder, skills[0])
    again = CliRunner().invoke(app, [*words, "--yes"])
    assert again.exit_code == 0 and "erased 0 files" in again.output and "weights" not in again.output
    # Nor does the command that would serve it ask for a reason first.
    served = CliRunner().invoke(app, ["promote", "v1", "-w", str(forgotten.folder)])
    assert "the weights of v001 were erased" in str(served.exception)


def test_a_skill_that_the_champion_was_taught_is_forgotten_first(learned: Path):
    workspace = Workspace(learned)
    with pytest.raises(InputError, match=r"champion v002 was taught 'colours'; .* perdure forget colours"):
        what_holds(workspace, "colours")
    with pytest.raises(InputError, match="holds no skill 'poetry'"):
        what_holds(workspace, "poetry")


def test_a_skill_that_was_refused_can_be_erased(forgotten: Workspace, skills: list[Path]):
    """Nobody forgets what was never promoted: its kept rows and its refused version go as well."""
    forgotten.rollback("v000")
    found = erase(forgotten, "numbers")
    assert found.versions == ("v002", "v003") and holds(forgotten.folder, skills[1]) == []
    assert verify(forgotten.folder) == []
