"""Versions, aliases, kept skills, runs, and the files they lie in."""

import json
import shutil
from pathlib import Path

import pytest

from perdure.files import read_json, read_jsonl, write_jsonl
from perdure.skills.base import load_skill
from perdure.types import InputError
from perdure.workspace import Workspace
from toy_versions import CONFIG, WEIGHTS, info, write_weights


def test_a_new_workspace(workspace):
    again = Workspace.open(workspace.folder)
    assert again.config() == CONFIG
    assert again.versions() == ["v000"] and again.next_version() == "v001" and again.lineage() == ["v000"]
    assert again.aliases() == {"champion": "v000", "previous": None, "candidate": None}
    assert again.version("champion")["hashes"] == {"base": "base-hash", "weights": "base-hash"}
    assert [(e["event"], e["version"], e["previous_line"]) for e in again.ledger()] == [("init", "v000", None)]
    assert again.taught() == {}


def test_create_and_open_refuse_what_is_something_else(tmp_path, workspace):
    with pytest.raises(InputError, match="already there"):
        Workspace.create(workspace.folder, CONFIG, "h")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="already there"):
        Workspace.create(tmp_path / "file", CONFIG, "h")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a workspace"):
        Workspace.open(tmp_path / "empty")
    assert Workspace.create(tmp_path / "empty", CONFIG, "h").versions() == ["v000"]


def test_promote_and_roll_back(grown):
    assert grown.aliases() == {"champion": "v002", "previous": "v001", "candidate": None}
    assert grown.lineage() == ["v000", "v001", "v002"] and grown.lineage("v1") == ["v000", "v001"]
    assert grown.rollback() == "v001"
    assert grown.aliases() == {"champion": "v001", "previous": "v002", "candidate": None}
    assert grown.rollback("v002") == "v002"
    assert grown.rollback("v0") == "v000"
    events = [(e["event"], e["version"], e["parent"]) for e in grown.ledger() if e["event"] != "init"]
    assert events == [("promote", "v001", "v000"), ("promote", "v002", "v001"), ("rollback", "v001", "v002"),
                      ("rollback", "v002", "v001"), ("rollback", "v000", "v002")]  # fmt: skip
    with pytest.raises(InputError, match="nothing before it"):
        grown.rollback()
    with pytest.raises(InputError, match="is the champion already"):
        grown.rollback("v000")


def test_going_back_from_a_replay_is_to_what_was_served_before_it(grown):
    """Its last version has a parent that never was the champion."""
    grown.add_version(info("v004", "v001", "skill3", branch="forget skill2, instead of v002"), write_weights)
    grown.add_version(info("v005", "v004", "skill4", branch="forget skill2, instead of v002"), write_weights)
    grown.promote("v005", "without skill2")
    assert grown.rollback() == "v002"
    assert grown.rollback() == "v001"


def test_only_a_promoted_version_can_be_rolled_back_to(grown):
    with pytest.raises(InputError, match="v003 was never promoted"):
        grown.rollback("v003")
    assert grown.aliases()["champion"] == "v002"
    grown.promote("v003", "by hand")
    grown.rollback()
    assert grown.rollback("v003") == "v003"


def test_promoting_the_champion_again_changes_nothing(grown):
    before = (grown.folder / "ledger.jsonl").read_bytes()
    grown.promote("champion", "again")
    assert (grown.folder / "ledger.jsonl").read_bytes() == before
    assert grown.aliases()["previous"] == "v001"


def test_names_and_aliases(grown):
    assert [grown.resolve(name) for name in ("champion", "previous", "v2", "2", "v002", "V2".lower())] == [
        "v002", "v001", "v002", "v002", "v002", "v002"]  # fmt: skip
    grown.hold("v003", reason="few rows")
    assert grown.resolve("candidate") == "v003" and grown.aliases()["champion"] == "v002"
    for name in ("v9", "..", "../bot", "v001/..", "", "/etc", "latest", "v001.tmp"):
        with pytest.raises(InputError, match="no version"):
            grown.version_folder(name)


def test_an_alias_that_is_not_set_or_leads_out(grown):
    with pytest.raises(InputError, match="no candidate version"):
        grown.resolve("candidate")
    aliases = grown.aliases() | {"candidate": "../../etc"}
    (grown.folder / "aliases.json").write_text(json.dumps(aliases), encoding="utf-8")
    with pytest.raises(InputError, match="no version"):
        grown.version_folder("candidate")


def test_a_version_never_changes(grown):
    def other_weights(folder: Path) -> None:
        write_weights(folder)
        (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])

    before = {p: p.read_bytes() for p in grown.folder.rglob("versions/**/*") if p.is_file()}
    with pytest.raises(InputError, match="differs in hashes"):
        grown.add_version(info("v001", "v000", "skill1"), other_weights)
    with pytest.raises(InputError, match="differs in parent, seed"):
        grown.add_version(info("v001", "v002", "skill1", seed=9), write_weights)
    # The same one again, made at another time: it is there already.
    grown.add_version(info("v001", "v000", "skill1", created="2027-01-01T00:00:00Z"), write_weights)
    after = {p: p.read_bytes() for p in grown.folder.rglob("versions/**/*") if p.is_file()}
    assert {p for p in after if ".tmp" not in str(p)} == set(before)
    assert all(after[p] == data for p, data in before.items())


def test_the_weights_hash_is_that_of_the_bytes(grown):
    hashes = [grown.version(name)["hashes"]["weights"] for name in ("v001", "v002")]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 64
    grown.add_version(info("v004", "v002"), lambda f: (f / "model.safetensors").write_bytes(WEIGHTS[1:]))
    assert grown.version("v004")["hashes"]["weights"] != hashes[0]


def test_numbers_that_json_has_not_are_refused(workspace):
    with pytest.raises(ValueError, match="JSON"):
        workspace.add_version(info("v001", "v000", scores={"a": float("nan")}), write_weights)
    with pytest.raises(ValueError, match="JSON"):
        workspace.append("evaluation", score=float("inf"))
    assert workspace.versions() == ["v000"] and len(workspace.ledger()) == 1


def test_parents_in_a_circle_are_damage(grown):
    path = grown.folder / "versions" / "v001" / "version.json"
    path.write_text(json.dumps(info("v001", "v002")), encoding="utf-8")
    with pytest.raises(InputError, match="among its own ancestors"):
        grown.lineage()


def test_links_that_lead_out_of_a_version_are_refused(grown, tmp_path):
    folder, outside = grown.folder / "versions" / "v002", tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(InputError, match="leads out of its folder"):
        grown.version_folder("v002")
    (folder / "model.safetensors").unlink()
    (folder / "evaluation" / "model.bin").write_bytes(b"x")
    (folder / "model.safetensors").symlink_to("evaluation/model.bin")  # inside: fine
    assert grown.version_folder("v002") == folder
    (folder / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="cannot be followed"):
        grown.version_folder("v002")
    shutil.move(folder, tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(InputError, match="leads out of its folder"):
        grown.version_folder("v002")


# Skills and runs


def test_a_kept_skill_is_a_copy(workspace, skill):
    kept = workspace.skills.keep(skill.folder, skill.name, skill.content_hash)
    assert kept == workspace.folder / "skills" / f"toy@{skill.content_hash[:8]}"
    assert load_skill(kept).content_hash == skill.content_hash
    assert workspace.skills.keep(skill.folder, skill.name, skill.content_hash) == kept
    assert [p.name for p in (workspace.folder / "skills").iterdir()] == [kept.name]


def test_a_skill_that_changed_is_not_kept_under_its_old_hash(workspace, skill):
    (skill.folder / "test.jsonl").write_text('{"prompt": "other", "completion": "a"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="was changed while it was in use"):
        workspace.skills.keep(skill.folder, skill.name, skill.content_hash)
    assert not (workspace.folder / "skills").exists()


def test_a_damaged_copy_is_found(workspace, skill):
    kept = workspace.skills.keep(skill.folder, skill.name, skill.content_hash)
    (kept / "train.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        workspace.skills.keep(skill.folder, skill.name, skill.content_hash)


def test_skills_taught_on_the_way_to_a_version(workspace):
    for number, (parent, name, content) in enumerate(
        [("v000", "a", "1" * 64), ("v001", "b", "2" * 64), ("v002", "a", "3" * 64), ("v001", "c", "4" * 64)], 1
    ):
        workspace.add_version(info(f"v00{number}", parent, name, content), write_weights)
    skills = workspace.folder / "skills"
    # a was taught again: its latest content counts, at its latest place.
    assert list(workspace.taught("v003").items()) == [("b", skills / "b@22222222"), ("a", skills / "a@33333333")]
    assert workspace.taught("v004") == {"a": skills / "a@11111111", "c": skills / "c@44444444"}
    assert workspace.taught() == {}


@pytest.mark.parametrize(("name", "content"), [("../../etc", "1" * 64), ("a", "../../../x"), ("a/b", "1" * 64)])
def test_a_version_cannot_name_a_skill_outside(workspace, name, content):
    workspace.add_version(info("v001", "v000", name, content), write_weights)
    with pytest.raises(InputError, match="no name of a kept skill"):
        workspace.taught("v001")


def test_stages_in_the_order_they_were_begun(grown):
    for stage in ("s100-skill8", "s09-skill9", "s04-skill4", "s01-skill1", ".s05-skill5.removed", "scratch"):
        grown.run_folder(stage).mkdir(parents=True)
        (grown.run_folder(stage) / "stage.json").write_text("{}", encoding="utf-8")
    grown.run_folder("s07-skill7").mkdir()  # not begun
    assert grown.runs.names() == ["s01-skill1", "s04-skill4", "s07-skill7", "s09-skill9", "s100-skill8"]
    assert grown.unfinished() == ["s04-skill4", "s09-skill9", "s100-skill8"]  # s01 gave v001
    assert grown.next_stage("new") == "s101-new"


def test_a_new_stage_does_not_take_the_number_of_a_version(workspace):
    assert workspace.next_stage("toy") == "s01-toy"
    workspace.add_version(info("v001", "v000", stage="s07-toy"), write_weights)
    assert workspace.next_stage("toy") == "s08-toy"  # although the run folder is gone


def test_a_run_is_removed_whole(workspace):
    run = workspace.run_folder("s01-toy")
    (run / "baseline").mkdir(parents=True)
    (run / "stage.json").write_text("{}", encoding="utf-8")
    workspace.runs.remove("s01-toy")
    assert list((workspace.folder / "runs").iterdir()) == []


# Files


def test_jsonl_keeps_every_character(tmp_path):
    rows = [{"text": "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng\n", "n": 1.5}, {"text": ""}]
    write_jsonl(tmp_path / "deep" / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "deep" / "rows.jsonl") == rows
    with pytest.raises(ValueError, match="JSON"):
        write_jsonl(tmp_path / "rows.jsonl", [{"n": float("nan")}])


def test_a_last_line_without_its_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}', encoding="utf-8")
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    assert read_jsonl(path, growing=True) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a": ', encoding="utf-8")
    assert read_jsonl(path, growing=True) == [{"a": 1}]
    with pytest.raises(InputError, match=r"rows\.jsonl:2: damaged"):
        read_jsonl(path)
    path.write_text("", encoding="utf-8")
    assert read_jsonl(path) == read_jsonl(path, growing=True) == []


def test_files_that_cannot_be_read_are_named(tmp_path):
    for read in (read_json, read_jsonl):
        with pytest.raises(InputError, match=r"absent: cannot be read: No such file"):
            read(tmp_path / "absent")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.json: damaged"):
        read_json(tmp_path / "bad.json")
