"""Versions, ledger, aliases, kept skills; and what a kill at any point leaves behind."""

import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from perdure.config import GateConfig, RunConfig
from perdure.skills.base import load_skill
from perdure.types import InputError
from perdure.workspace import Workspace, read_json, read_jsonl, replace_text, write_jsonl

CONFIG = RunConfig(seed=3, gate=GateConfig(budget=0.1))
WEIGHTS = bytes(range(256)) * 16


def info(version: str, parent: str, skill: str = "toy", content: str = "c" * 64, **changed) -> dict:
    return {"version": version, "parent": parent, "stage": f"s{int(version[1:]):02d}-{skill}", "skill": skill,
            "method": "sdft", "seed": 0,
            "created": "2026-01-01T00:00:00Z", "hashes": {"base": "b", "skill": content},
            "scores": {}} | changed  # fmt: skip


def write_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "toy.jsonl").write_text('{"id": "1"}\n', encoding="utf-8")


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace.create(tmp_path / "bot", CONFIG, "base-hash")


@pytest.fixture
def grown(workspace) -> Workspace:
    """v001 and v002 promoted one after the other, v003 refused."""
    for number in (1, 2, 3):
        workspace.add_version(info(f"v00{number}", f"v00{number - 1}", f"skill{number}"), write_weights)
        if number < 3:
            workspace.promote(f"v00{number}", "learned")
    return workspace


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
    grown.set_candidate("v003")
    assert grown.resolve("candidate") == "v003" and grown.aliases()["champion"] == "v002"
    for name in ("v9", "..", "../bot", "v001/..", "", "/etc", "latest", "v001.tmp"):
        with pytest.raises(InputError, match="no version"):
            grown.version_folder(name)


def test_an_alias_that_is_not_set_or_leads_out(grown):
    with pytest.raises(InputError, match="no candidate version"):
        grown.resolve("candidate")
    grown.set_candidate("../../etc")
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


# The ledger


def test_the_ledger_only_grows_and_is_chained(grown):
    path = grown.folder / "ledger.jsonl"
    before = path.read_bytes()
    grown.append("verdict", version="v003", reason="größer\u2028<b>")
    assert path.read_bytes().startswith(before)
    assert grown.verify_ledger() == len(grown.ledger()) == 4
    assert grown.ledger()[-1]["reason"] == "größer\u2028<b>"


@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_changed_line_is_found(grown, line):
    path = grown.folder / "ledger.jsonl"
    lines = path.read_bytes().split(b"\n")
    grown.append("verdict", version="v003")
    assert grown.verify_ledger() == 4
    changed = path.read_bytes().split(b"\n")
    changed[line - 1] = lines[line - 1].replace(b'"time"', b'"Time"')
    path.write_bytes(b"\n".join(changed))
    with pytest.raises(InputError, match=rf"ledger\.jsonl:{line + 1}: the chain is broken"):
        grown.verify_ledger()


def test_lines_taken_out_put_in_or_swapped_are_found(grown):
    path = grown.folder / "ledger.jsonl"
    first, second, third, _ = path.read_bytes().split(b"\n")
    for lines, number in (([second, third], 1), ([first, third], 2), ([first, first, second], 2),
                          ([first, third, second], 2), ([first, second, second], 3)):  # fmt: skip
        path.write_bytes(b"\n".join(lines) + b"\n")
        with pytest.raises(InputError, match=rf"ledger\.jsonl:{number}: the chain is broken"):
            grown.verify_ledger()


def test_a_damaged_line_is_named(grown):
    path = grown.folder / "ledger.jsonl"
    lines = path.read_bytes().split(b"\n")
    for bad in (b"{", b"[]", b"", b"\xff", b"[" * 9000):
        path.write_bytes(b"\n".join([lines[0], bad, *lines[2:]]))
        with pytest.raises(InputError, match=r"ledger\.jsonl:2: damaged"):
            grown.verify_ledger()
        with pytest.raises(InputError, match=r"ledger\.jsonl:2: damaged"):
            Workspace.open(grown.folder)


def test_a_ledger_without_a_beginning_is_damage(workspace):
    for write in (lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b'{"event": "verdict"}\n'), Path.unlink):
        write(workspace.folder / "ledger.jsonl")
        with pytest.raises(InputError, match=r"ledger\.jsonl"):
            Workspace.open(workspace.folder)


def test_a_torn_last_line_is_cut_off_by_the_next_append(grown):
    path = grown.folder / "ledger.jsonl"
    whole = path.read_bytes()
    grown.append("verdict", version="v003")
    last = path.read_bytes()[len(whole) :]
    for cut in range(1, len(last)):
        path.write_bytes(whole + last[:-cut])
        again = Workspace.open(grown.folder)
        assert len(again.ledger()) == 3 and again.verify_ledger() == 3  # it was never acknowledged
        again.append("verdict", version="v003", cut=cut)
        assert again.verify_ledger() == 4 and again.ledger()[-1]["cut"] == cut
        assert path.read_bytes().startswith(whole)


def test_a_torn_first_line(workspace):
    path = workspace.folder / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:10])
    workspace.append("init", version="v000")
    assert workspace.verify_ledger() == 1 and workspace.ledger()[0]["previous_line"] is None


@pytest.mark.parametrize("aliases", [None, b"", b"{", b"[1]", b'{"champion": "v001", "previous": "v000"}', b"{}"])
def test_open_heals_aliases_by_the_ledger(grown, aliases):
    path = grown.folder / "aliases.json"
    good = path.read_bytes()
    path.unlink()
    if aliases is not None:
        path.write_bytes(aliases)
    assert Workspace.open(grown.folder).aliases() == {"champion": "v002", "previous": "v001", "candidate": None}
    assert path.read_bytes() == good
    grown.rollback()
    path.write_bytes(good)
    assert Workspace.open(grown.folder).aliases() == {"champion": "v001", "previous": "v002", "candidate": None}


def test_open_leaves_good_aliases_alone(grown):
    grown.set_candidate("v003")
    before = (grown.folder / "aliases.json").stat()
    assert Workspace.open(grown.folder).aliases()["candidate"] == "v003"
    assert (grown.folder / "aliases.json").stat().st_mtime_ns == before.st_mtime_ns
    assert not (grown.folder / ".lock").exists()


def test_the_lock_heals_too(grown):
    (grown.folder / "aliases.json").write_text('{"champion": "v001", "previous": "v000"}', encoding="utf-8")
    with grown.lock():
        assert grown.aliases()["champion"] == "v002"


# Skills


@pytest.fixture
def skill(tmp_path):
    return load_skill(toy(tmp_path / "source", "toy"))


def toy(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / "skill.toml").write_text(f'name = "{name}"\n', encoding="utf-8")
    for file in ("train", "test"):
        (folder / f"{file}.jsonl").write_text(f'{{"prompt": "{file}", "completion": "a"}}\n', encoding="utf-8")
    return folder


def test_a_kept_skill_is_a_copy(workspace, skill):
    kept = workspace.keep_skill(skill.folder, skill.name, skill.content_hash)
    assert kept == workspace.folder / "skills" / f"toy@{skill.content_hash[:8]}"
    assert load_skill(kept).content_hash == skill.content_hash
    assert workspace.keep_skill(skill.folder, skill.name, skill.content_hash) == kept
    assert [p.name for p in (workspace.folder / "skills").iterdir()] == [kept.name]


def test_a_skill_that_changed_is_not_kept_under_its_old_hash(workspace, skill):
    (skill.folder / "test.jsonl").write_text('{"prompt": "other", "completion": "a"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="was changed while it was in use"):
        workspace.keep_skill(skill.folder, skill.name, skill.content_hash)
    assert not (workspace.folder / "skills").exists()


def test_a_damaged_copy_is_found(workspace, skill):
    kept = workspace.keep_skill(skill.folder, skill.name, skill.content_hash)
    (kept / "train.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        workspace.keep_skill(skill.folder, skill.name, skill.content_hash)


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
    assert grown.stages() == ["s01-skill1", "s04-skill4", "s07-skill7", "s09-skill9", "s100-skill8"]
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
    workspace.remove_run("s01-toy")
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


# Kills


def child(action: Callable[[], object]) -> int:
    """The process id of a child that runs ``action``; it ends with 0, or with 1 and its traceback on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads; this child only writes files
        pid = os.fork()
    if pid:
        return pid
    try:
        action()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)
    os._exit(0)


def killed_at(point: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a child that dies at its n-th fsync, rename or half through its n-th file; False when it came
    to its end before."""
    calls = 0

    def dying(real, half=None):
        def call(*args, **options):
            nonlocal calls
            if calls == point:
                if half:
                    half(*args)
                os._exit(9)
            calls += 1
            return real(*args, **options)

        return call

    def run():
        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        text, data = Path.write_text, Path.write_bytes
        Path.write_text = dying(text, lambda p, value: data(p, value.encode()[: len(value) // 2]))
        Path.write_bytes = dying(data, lambda p, value: data(p, value[: len(value) // 2]))
        action()

    code = os.waitstatus_to_exitcode(os.waitpid(child(run), 0)[1])
    assert code in (0, 9), "the action failed by itself"
    return code == 9


def is_whole(workspace: Workspace) -> None:
    """Opens, and everything visible is complete."""
    again = Workspace.open(workspace.folder)
    assert again.verify_ledger() >= 1
    for name in again.versions()[1:]:
        assert again.version(name)["version"] == name
        assert (again.version_folder(name) / "model.safetensors").read_bytes() == WEIGHTS
    assert again.aliases()["champion"] in again.versions()
    for folder in (again.folder / "skills").glob("[!.]*"):
        assert load_skill(folder).content_hash.startswith(folder.name.split("@")[1])


def actions(workspace: Workspace, skill) -> dict[str, Callable[[], object]]:
    return {
        "add_version": lambda: workspace.add_version(info("v002", "v001", "new"), write_weights),
        "promote": lambda: workspace.promote("v001", "learned"),
        "rollback": lambda: workspace.rollback("v000"),
        "keep_skill": lambda: workspace.keep_skill(skill.folder, skill.name, skill.content_hash),
        "append": lambda: workspace.append("evaluation", version="v001"),
    }


def state(workspace: Workspace) -> tuple:
    """What a reader sees, times and leftovers aside."""
    kept = sorted(p.name for p in (workspace.folder / "skills").glob("[!.]*"))
    events = [(e["event"], e["version"]) for e in workspace.ledger()]
    return workspace.versions(), workspace.aliases(), kept, events


@pytest.mark.parametrize("name", ["add_version", "promote", "rollback", "keep_skill", "append"])
def test_a_kill_at_any_point_leaves_a_workspace_in_which_the_call_can_be_repeated(tmp_path, skill, name):
    start = Workspace.create(tmp_path / "start", CONFIG, "base-hash")
    start.add_version(info("v001", "v000", "old"), write_weights)
    if name == "rollback":
        start.promote("v001", "learned")
    done = Workspace(shutil.copytree(start.folder, tmp_path / "done"))
    actions(done, skill)[name]()
    point = 0
    while True:
        workspace = Workspace(shutil.copytree(start.folder, tmp_path / f"at{point}"))
        before = state(workspace)
        action = actions(workspace, skill)[name]
        if not killed_at(point, action):
            break
        is_whole(workspace)
        workspace = Workspace.open(workspace.folder)
        assert state(workspace) in (before, state(done))  # all of it or nothing
        finished = state(workspace) == state(done)
        if not (finished and name in ("rollback", "append")):  # these two say something new each time
            action()
        is_whole(workspace)
        assert state(workspace) == state(done)
        point += 1
    assert point >= {"append": 1}.get(name, 4)


def test_a_second_process_is_refused_and_a_dead_one_frees_the_lock(workspace):
    ready, proceed = os.pipe(), os.pipe()

    def hold():
        with workspace.lock():
            os.write(ready[1], b"x")
            os.read(proceed[0], 1)

    pid = child(hold)
    os.read(ready[0], 1)
    try:
        with pytest.raises(InputError, match=rf"another perdure works here \(process {pid}\)"), workspace.lock():
            pass
        # A reader is not in the way of the writer, not even where it would have something to mend.
        (workspace.folder / "aliases.json").write_text("{}", encoding="utf-8")
        Workspace.open(workspace.folder)
        assert (workspace.folder / "aliases.json").read_text(encoding="utf-8") == "{}"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for end in (*ready, *proceed):
            os.close(end)
    with workspace.lock():
        assert (workspace.folder / ".lock").read_text(encoding="utf-8") == str(os.getpid())
        assert workspace.aliases()["champion"] == "v000"
    with workspace.lock():  # and it is free again
        pass


def test_replace_text_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    for point in range(4):
        path.write_text("old", encoding="utf-8")
        killed = killed_at(point, lambda: replace_text(path, "new text"))
        assert path.read_text(encoding="utf-8") in ("old", "new text")
        assert killed or path.read_text(encoding="utf-8") == "new text"
