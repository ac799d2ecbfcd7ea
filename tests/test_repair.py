"""Repairing a candidate that hurt an earlier skill, and taking a skill out again: whole stages on a tiny model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fakes import NUMBERS, save_tiny_model, toy_skill, two_toy_skills
from perdure import judging, repair
from perdure.config import RunConfig, TrainConfig, with_settings
from perdure.curriculum import _tell_of_known_rows, learn
from perdure.files import read_jsonl
from perdure.forgetting import forget
from perdure.reporting import Silent
from perdure.running import open_version
from perdure.session import base_as_teacher
from perdure.skills.base import load_skill
from perdure.stages import Outcome, create_workspace
from perdure.types import InputError, Verdict
from perdure.workspace import Workspace

Setup = tuple[Path, list[Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("made")
    return save_tiny_model(folder / "model", copies=True), two_toy_skills(folder)


def settings(model: Path, **gate: Any) -> RunConfig:
    """On 8 test rows: a budget that so few can judge."""
    train = {"method": "sft", "learning_rate": 3e-3, "steps": 40, "warm_start_steps": 20, "anchor_share": 0.0,
             "anchor_general_tokens": 4}  # fmt: skip
    return RunConfig.model_validate(
        {"model": {"source": str(model), "compute_dtype": "float32"}, "probe": {"tasks": []}, "train": train,
         "gate": {"budget": 0.45, "repair": 6} | gate}
    )  # fmt: skip


def taught(folder: Path, made: Setup, **gate: Any) -> Workspace:
    config = settings(made[0], **gate)
    workspace = create_workspace(folder, config)
    learn(workspace, made[1], config, Silent())
    return workspace


def weights(workspace: Workspace, version: str) -> dict[str, torch.Tensor]:
    return load_file(workspace.version_folder(version) / "model.safetensors")


def attempts(workspace: Workspace) -> list[tuple[str, str]]:
    return [(e["attempt"], e["decision"]) for e in workspace.ledger() if e["event"] == "repair"]


@pytest.fixture(scope="module")
def unrepaired(tmp_path_factory: pytest.TempPathFactory, made: Setup) -> Workspace:
    return taught(tmp_path_factory.mktemp("unrepaired") / "bot", made, repair=0)


def test_without_repair_the_candidate_is_refused(unrepaired: Workspace):
    assert unrepaired.resolve("champion") == "v001" and not attempts(unrepaired)
    assert "colours: got worse" in unrepaired.version("v002")["verdict"]["reasons"][0]


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory, made: Setup) -> Workspace:
    return taught(tmp_path_factory.mktemp("repaired") / "bot", made, significance=0.1)


def test_the_first_attempt_that_passes_becomes_the_version(repaired: Workspace, unrepaired: Workspace):
    assert attempts(repaired) == [("blend 0.75", "refused"), ("blend 0.5", "refused"), ("blend 0.25", "promoted")]
    assert repaired.resolve("champion") == "v002"
    reasons = repaired.version("v002")["verdict"]["reasons"]
    assert reasons[0].startswith("Repaired (blend 0.25) after: colours: got worse")
    parent, candidate = weights(unrepaired, "v001"), weights(unrepaired, "v002")
    for name, value in weights(repaired, "v002").items():
        assert torch.equal(value, torch.lerp(parent[name], candidate[name], 0.25))


def test_the_published_scores_are_those_of_the_published_weights(repaired: Workspace):
    from perdure.curriculum import evaluate_version

    measured = evaluate_version(repaired, "v002", [], repaired.config(), False, Silent())
    assert measured["scores"] == repaired.version("v002")["scores"]


def test_where_no_attempt_passes_the_candidate_stays_as_it_was_trained(
    tmp_path: Path, made: Setup, unrepaired: Workspace
):
    workspace = taught(tmp_path / "bot", made)
    labels = ["blend 0.75", "blend 0.5", "blend 0.25", "more anchors", "smaller rate"]
    assert [label for label, _ in attempts(workspace)] == labels
    assert {decision for _, decision in attempts(workspace)} <= {"refused", "held"}
    assert workspace.resolve("champion") == "v001"
    first, second = (w.version("v002")["hashes"]["weights"] for w in (workspace, unrepaired))
    assert first == second


def test_a_version_says_how_it_was_trained_and_what_its_stage_took(
    tmp_path: Path, made: Setup, unrepaired: Workspace, monkeypatch: pytest.MonkeyPatch
):
    """Where the second training of a repair passes, the settings are that one's; its tokens are those of both."""
    real = repair.measure_candidate

    def only_the_slower(run: Any, *args: Any, **options: Any) -> Any:
        found = real(run, *args, **options)
        slower = (run.folder / "repair-smaller-rate").is_dir()
        return replace(found, verdict=replace(found.verdict, decision="promoted")) if slower else found

    monkeypatch.setattr(repair, "measure_candidate", only_the_slower)
    workspace = taught(tmp_path / "bot", made)
    first, found = unrepaired.version("v002"), workspace.version("v002")
    assert attempts(workspace)[-1] == ("smaller rate", "promoted") and workspace.resolve("champion") == "v002"
    rate = first["config"]["train"]["learning_rate"]
    assert found["config"]["train"]["learning_rate"] == rate / 3 and found["asked"]["train"]["learning_rate"] == rate
    runs = [workspace.run_folder(found["stage"]) / name for name in ("", "repair-more-anchors", "repair-smaller-rate")]
    spent = [read_jsonl(run / "timings.jsonl")[-1]["tokens"] for run in runs]
    for part in ("student", "teacher", "rollout"):  # a stage's last validation is in no line of its timings
        assert found["cost"]["tokens"][part] == sum(tokens[part] for tokens in spent)
    assert spent[0]["student"] == first["cost"]["tokens"]["student"] and all(tokens["student"] for tokens in spent)
    # And it is finished under the settings that were asked for.
    (again,) = learn(workspace, made[1][1:], settings(made[0]), Silent())
    assert (again.version, again.decision) == ("v002", "promoted")


def test_only_what_was_learned_is_repaired(unrepaired: Workspace):
    table = unrepaired.version("v002")["verdict"]["table"]
    harmed = Verdict("refused", ("colours: got worse",), tuple(table))
    assert repair.worth_repairing(harmed)
    for verdict in ("not learned", "cannot tell"):
        rows = tuple(row | {"verdict": verdict} if row["kind"] == "new skill" else row for row in table)
        assert not repair.worth_repairing(replace(harmed, table=rows))


def test_an_interrupted_repair_goes_on_and_repeats_no_line(
    tmp_path: Path, made: Setup, repaired: Workspace, monkeypatch: pytest.MonkeyPatch
):
    config = settings(made[0], significance=0.1)
    workspace = create_workspace(tmp_path / "bot", config)
    real, calls = repair.measure_candidate, 0

    def dying(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(repair, "measure_candidate", dying)
    with pytest.raises(KeyboardInterrupt):
        learn(workspace, made[1], config, Silent())
    assert attempts(workspace) == [("blend 0.75", "refused"), ("blend 0.5", "refused")]
    learn(workspace, made[1], config, Silent())
    assert attempts(workspace) == attempts(repaired) and calls == 4
    first, second = (w.version("v002")["hashes"]["weights"] for w in (workspace, repaired))
    assert first == second


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_other_settings_for_what_is_known_already_are_named(repaired: Workspace, made: Setup):
    notes, config = Notes(), settings(made[0], significance=0.1)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": config.train.steps + 1})})
    learn(repaired, made[1], config, notes)
    assert notes.said[-2:] == [f"{name}: promoted already as {version}; nothing to do."
                               for name, version in (("colours", "v001"), ("numbers", "v002"))]  # fmt: skip
    learn(repaired, made[1], longer, notes)
    assert f"It was taught with train.steps = {config.train.steps}: to teach it otherwise" in notes.said[-1]


def test_test_rows_that_were_trained_on_are_named(repaired: Workspace, made: Setup, tmp_path: Path):
    swapped = shutil.copytree(made[1][0], tmp_path / "colours")
    for name, other in (("train", "test"), ("test", "train")):
        shutil.copy(made[1][0] / f"{name}.jsonl", swapped / f"{other}.jsonl")
    notes, skill = Notes(), load_skill(swapped)
    _tell_of_known_rows(repaired, [skill, load_skill(made[1][1])], notes)
    (said,) = notes.said
    assert said.startswith(
        f"colours: {len(skill.test)} of its {len(skill.test)} test prompts were training rows of v001"
    )


def test_a_repair_is_strict_about_losses_that_chance_could_explain(tmp_path: Path, made: Setup):
    """blend 0.5 loses 4 of 8 (p = 0.06): not significant at 0.05, but more than the budget of 45 points."""
    workspace = taught(tmp_path / "bot", made, repair=2)
    last = [event for event in workspace.ledger() if event["event"] == "repair"][-1]
    assert "100.0% to 50.0%" in last["reason"] and last["decision"] == "refused"


@pytest.mark.parametrize("rows", [32, 0])
def test_an_earlier_checkpoint_is_tried_first(tmp_path: Path, made: Setup, rows: int):
    """Also where no validation has chosen the weights: then the stage ended with its last step."""
    config = settings(made[0], repair=1)
    changed = {"checkpoint_every": 15, "validation_max": rows}
    config = config.model_copy(update={"train": config.train.model_copy(update=changed)})
    workspace = create_workspace(tmp_path / "bot", config)
    learn(workspace, made[1], config, Silent())
    assert [label for label, _ in attempts(workspace)] == ["checkpoint 30"]


def test_another_gate_judges_what_is_on_file_and_trains_nothing(tmp_path: Path, made: Setup, unrepaired: Workspace):
    workspace = Workspace(shutil.copytree(unrepaired.folder, tmp_path / "bot"))
    lines = len(workspace.ledger())
    strict = settings(made[0], repair=0, significance=0.01)
    (_, second) = learn(workspace, made[1], strict, Silent())
    assert (second.version, second.decision) == ("v002", "refused")  # 0 to 75 % on 8 items, p = 0.016
    assert workspace.versions() == ["v000", "v001", "v002"] and len(workspace.runs.names()) == 2
    assert [event["event"] for event in workspace.ledger()[lines:]] == ["verdict", "refuse"]
    assert len(learn(workspace, made[1], strict, Silent())) == 2 and len(workspace.ledger()) == lines + 2  # once
    free = settings(made[0], repair=0, enforce=False)
    (_, second) = learn(workspace, made[1], free, Silent())
    assert second.decision == "promoted" and workspace.resolve("champion") == "v002"
    workspace.rollback()
    (_, second) = learn(workspace, made[1], settings(made[0], repair=0), Silent())  # the first gate again
    assert second.decision == "refused" and workspace.resolve("champion") == "v001"


def test_a_stage_whose_parent_was_rolled_back_meanwhile_is_held(
    tmp_path: Path, made: Setup, monkeypatch: pytest.MonkeyPatch
):
    config = settings(made[0], enforce=False)
    workspace = create_workspace(tmp_path / "bot", config)
    learn(workspace, made[1][:1], config, Silent())
    real = judging.measure_candidate

    def while_it_is_measured(*args: Any, **options: Any) -> Any:
        Workspace.open(workspace.folder).rollback()
        return real(*args, **options)

    monkeypatch.setattr(judging, "measure_candidate", while_it_is_measured)
    (outcome,) = learn(workspace, made[1][1:], config, Silent())
    assert (outcome.version, outcome.decision) == ("v002", "held") and "perdure promote v002" in outcome.reasons[0]
    assert workspace.aliases() == {"champion": "v000", "previous": "v001", "candidate": "v002"}


def test_a_kill_between_the_new_verdict_and_its_promotion(
    tmp_path: Path, made: Setup, unrepaired: Workspace, monkeypatch: pytest.MonkeyPatch
):
    workspace = Workspace(shutil.copytree(unrepaired.folder, tmp_path / "bot"))
    lax = settings(made[0], repair=0, enforce=False)
    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "promote", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn(workspace, made[1], lax, Silent())
    learn(workspace, made[1], lax, Silent())
    assert [event["event"] for event in workspace.ledger()][-2:] == ["verdict", "promote"]
    assert workspace.resolve("champion") == "v002"


# Forgetting


def test_forgetting_gives_the_weights_that_were_never_taught_the_skill(tmp_path: Path, made: Setup):
    workspace = taught(tmp_path / "bot", made, significance=0.1, confidence=0.1)
    config = workspace.config()
    clean = create_workspace(tmp_path / "clean", config)
    learn(clean, made[1][1:], config, Silent())
    done = forget(workspace, "colours", config, Silent())
    assert done.decision == "promoted" and done.version == "v003" and workspace.resolve("champion") == "v003"
    assert (done.before, done.after, done.n) == (0.75, 0.0, 8)
    assert workspace.version("v003")["hashes"]["weights"] == clean.version("v001")["hashes"]["weights"]
    assert list(workspace.taught()) == ["numbers"] and workspace.lineage() == ["v000", "v003"]
    events = [event["event"] for event in workspace.ledger()][-6:]
    assert events == ["candidate", "verdict", "accept", "verdict", "forget", "promote"]
    assert workspace.rollback() == "v002"  # and nothing is lost
    assert list(workspace.taught()) == ["colours", "numbers"]


def test_forgetting_begins_with_what_a_kill_left(tmp_path: Path, made: Setup, monkeypatch: pytest.MonkeyPatch):
    """The second skill's version is there, but not its promotion: it is taken out all the same."""
    workspace = create_workspace(tmp_path / "bot", settings(made[0], enforce=False))
    config = workspace.config()
    learn(workspace, made[1][:1], config, Silent())
    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "promote", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn(workspace, made[1][1:], config, Silent())
    assert workspace.resolve("champion") == "v001"
    done = forget(workspace, "numbers", config, Silent())
    assert (done.version, done.decision) == ("v001", "promoted") and list(workspace.taught()) == ["colours"]


def test_what_waits_for_a_person_is_not_forgotten_in_silence(tmp_path: Path, made: Setup):
    class Noting(Silent):
        def __init__(self) -> None:
            self.said: list[str] = []

        def note(self, text: str) -> None:
            self.said.append(text)

    workspace, reporter = create_workspace(tmp_path / "bot", settings(made[0], enforce=False)), Noting()
    config = workspace.config()
    learn(workspace, made[1][:1], config, Silent())
    workspace.rollback()
    workspace.hold("v001", reason="Said here.")
    learn(workspace, made[1][1:], config, reporter)
    assert reporter.said[0] == ("v001 (colours) is held and waits for a decision; this starts from the champion v000, "
                                "without it.")  # fmt: skip


def test_forgetting_the_last_skill_needs_no_training(tmp_path: Path, made: Setup):
    workspace = taught(tmp_path / "bot", made, significance=0.1, confidence=0.1)
    done = forget(workspace, "numbers", workspace.config(), Silent())
    assert done.version == "v001" and workspace.versions() == ["v000", "v001", "v002"]
    assert list(workspace.taught()) == ["colours"]


def test_what_forget_refuses_is_the_versions_verdict(tmp_path: Path, made: Setup, monkeypatch: pytest.MonkeyPatch):
    """Its last stage was accepted on the branch, but the replay as a whole was not: it is promoted by force only."""
    workspace = taught(tmp_path / "bot", made, significance=0.1, confidence=0.1)
    said = Verdict("refused", ("numbers: got worse.",), ())
    monkeypatch.setattr("perdure.forgetting.decide_kept", lambda *_: said)
    done = forget(workspace, "colours", workspace.config(), Silent())
    verdict = workspace.verdict(done.version)
    assert done.decision == "refused" and workspace.resolve("champion") == "v002"
    assert verdict is not None and (verdict["decision"], verdict["reasons"]) == ("refused", ["numbers: got worse."])
    events = len(workspace.ledger())
    forget(workspace, "colours", workspace.config(), Silent())
    assert len(workspace.ledger()) == events


def test_where_the_gate_is_off_what_is_served_is_called_promoted(tmp_path: Path, made: Setup):
    workspace = taught(tmp_path / "bot", made, enforce=False)
    done = forget(workspace, "numbers", workspace.config(), Silent())
    assert done.decision == "promoted" and workspace.resolve("champion") == done.version == "v001"


def test_another_base_model_than_the_ledger_says_is_refused(repaired: Workspace, tmp_path: Path):
    other = save_tiny_model(tmp_path / "other", copies=False)
    moved = settings(other)
    with pytest.raises(InputError, match=r"other is not the base model that this workspace was made with"):
        open_version(repaired, "v000", moved)
    session = open_version(repaired, "v001", moved)  # has weights of its own
    with pytest.raises(InputError, match="is not the base model"):
        base_as_teacher(moved, session)


def test_what_a_command_brings_for_a_later_stage_does_not_stand_for_what_was_taught(
    tmp_path: Path, made: Setup, repaired: Workspace, monkeypatch: pytest.MonkeyPatch
):
    """colours was taught, and comes again with other rows after a third skill: that one has to keep the old rows."""
    changed = toy_skill(tmp_path / "colours", {"cat": "black", "dog": "green"})
    third = toy_skill(tmp_path / "third", NUMBERS)
    scopes: dict[str, dict[str, str]] = {}

    def seen(workspace: Workspace, skill: Any, scope: Any, *_: Any, **__: Any) -> Outcome:
        scopes[skill.name] = {name: content.content_hash for name, content in scope.items()}
        return Outcome(skill.name, "s", None, "refused", ())

    monkeypatch.setattr("perdure.curriculum.learn_one", seen)
    learn(Workspace(shutil.copytree(repaired.folder, tmp_path / "bot")), [third, changed], repaired.config(), Silent())
    old, new = load_skill(made[1][0]).content_hash, load_skill(changed).content_hash
    assert scopes["third"]["colours"] == old and scopes["colours"]["colours"] == new


def test_a_skill_that_is_taught_again_without_a_gain_is_promoted_where_it_is_kept(
    tmp_path: Path, made: Setup, unrepaired: Workspace
):
    more = toy_skill(tmp_path / "colours")
    rows = (more / "train.jsonl").read_text().splitlines()
    (more / "train.jsonl").write_text("\n".join([*rows, rows[0].replace("say", "say say")]) + "\n")
    workspace = Workspace(shutil.copytree(unrepaired.folder, tmp_path / "bot"))
    config = with_settings(settings(made[0]), ["train.learning_rate=1e-9", "train.steps=1", "train.method=sft"])
    (found,) = learn(workspace, [more], config, Silent())
    assert found.decision == "promoted" and workspace.resolve("champion") == found.version
    assert [row["verdict"] for row in workspace.version(str(found.version))["verdict"]["table"]] == ["kept"]


def test_what_was_not_taught_cannot_be_forgotten(repaired: Workspace):
    with pytest.raises(InputError, match="not taught 'poetry'; it knows colours, numbers"):
        forget(repaired, "poetry", repaired.config(), Silent())


def test_a_version_carries_its_model_card(repaired: Workspace):
    from huggingface_hub import ModelCard

    card = ModelCard((repaired.version_folder("v002") / "README.md").read_text(encoding="utf-8"))
    info = repaired.version("v002")
    results = {result.dataset_name: result for result in card.data.eval_results or []}
    assert results["numbers"].metric_value == info["scores"]["numbers"]["accuracy"]
    assert results["numbers"].dataset_revision == info["hashes"]["skill"]
    assert info["hashes"]["weights"] in card.text and "| colours | " in card.text
    assert info["verdict"]["reasons"][0] in card.text


def test_a_repair_rehearses_nothing_that_may_not_be():
    """``anchor_rehearsal = 0`` is where earlier demonstrations may not be used."""
    harmed = Verdict("refused", ("worse",), ({"kind": "skill", "name": "old", "verdict": "worse"},))
    assert repair._anchored(TrainConfig(anchor_rehearsal=0.0), harmed).anchor_rehearsal == 0.0
    assert repair._anchored(TrainConfig(anchor_rehearsal=0.5), harmed).anchor_rehearsal == 1.0
