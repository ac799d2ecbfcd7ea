"""What a kill at any point of a write leaves behind, and one writer at a time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from perdure.skills.base import load_skill
from perdure.types import InputError
from perdure.workspace import Workspace, replace_text
from toy_versions import WEIGHTS, info, new_workspace, write_weights


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


CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR


def killed_at(point: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a child that dies just before its n-th change of the file system (a file opened for writing, a
    rename, a removal ...), its n-th fsync, or half through its n-th whole file. False when it ended before."""
    calls = 0

    def reached() -> bool:
        nonlocal calls
        calls += 1
        return calls > point

    def audit(event, args):
        changes = event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITING)
        if changes and reached():
            os._exit(9)

    def dying(real, half):
        def call(*args, **options):
            if reached():
                half(*args)
                os._exit(9)
            return real(*args, **options)

        return call

    def run():
        sys.addaudithook(audit)
        os.fsync = dying(os.fsync, lambda _: None)
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
        "keep_skill": lambda: workspace.skills.keep(skill.folder, skill.name, skill.content_hash),
        "append": lambda: workspace.append("evaluation", version="v001"),
    }


def state(workspace: Workspace) -> tuple:
    """What a reader sees, times and leftovers aside."""
    kept = sorted(p.name for p in (workspace.folder / "skills").glob("[!.]*"))
    events = [(e["event"], e["version"]) for e in workspace.ledger()]
    return workspace.versions(), workspace.aliases(), kept, events


@pytest.mark.parametrize("name", ["add_version", "promote", "rollback", "keep_skill", "append"])
def test_a_kill_at_any_point_leaves_a_workspace_in_which_the_call_can_be_repeated(tmp_path, skill, name):
    start = new_workspace(tmp_path / "start")
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
    assert point >= {"append": 2}.get(name, 7)


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
        # A reader need not wait for a stage to end, not even where it has something to mend.
        (workspace.folder / "aliases.json").write_text("{}", encoding="utf-8")
        Workspace.open(workspace.folder)
        assert workspace.aliases() == {"champion": "v000", "previous": None, "candidate": None}
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
    for point in range(8):
        path.write_text("old", encoding="utf-8")
        killed = killed_at(point, lambda: replace_text(path, "new text"))
        assert path.read_text(encoding="utf-8") in ("old", "new text")
        assert killed or path.read_text(encoding="utf-8") == "new text"
    assert not killed


@pytest.mark.parametrize("kind", ["whole", "stack"])
def test_kills_at_random_moments_of_whole_stages_change_nothing(tmp_path, kind: str):
    """PERDURE_KILLS=200 for the long run (about five minutes each)."""
    kills = int(os.environ.get("PERDURE_KILLS", "12"))
    script = Path(__file__).parent / "killing.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "w"), str(kills), "0", kind],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert sum(json.loads(done.stdout)["kills"].values()) == kills
