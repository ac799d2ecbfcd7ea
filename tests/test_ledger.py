"""The ledger: append-only, chained, mended after a kill; and the aliases that follow it."""

import threading
from pathlib import Path

import pytest

from perdure import ledger
from perdure.types import InputError
from perdure.workspace import Workspace


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


def test_an_event_whose_head_cannot_be_written_did_not_happen(grown, monkeypatch):
    """Else the command fails, is repeated, and goes back twice."""
    before, champion = (grown.folder / "ledger.jsonl").read_bytes(), grown.resolve("champion")

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(ledger, "replace_text", full)
        grown.rollback()
    assert (grown.folder / "ledger.jsonl").read_bytes() == before and grown.resolve("champion") == champion
    assert grown.rollback() == "v001"


def test_an_event_whose_head_is_written_counts_although_its_folder_could_not_be_synced(grown, monkeypatch):
    """Else the head counts a line that is not there, and nothing can be appended ever again."""
    replace_text = ledger.replace_text

    def unsynced(path, text):
        replace_text(path, text)
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(ledger, "replace_text", unsynced)
        grown.rollback()
    assert grown.verify_ledger() == len(grown.ledger()) and grown.ledger()[-1]["event"] == "rollback"
    assert Workspace.open(grown.folder).resolve("champion") == "v001"


def test_what_was_held_and_then_refused_under_another_gate_waits_for_nobody(grown):
    version = grown.versions()[-1]
    grown.hold(version, reason="cannot tell")
    assert grown.aliases()["candidate"] == version
    grown.refuse(version, reason="got worse")
    assert grown.aliases()["candidate"] is None and grown.expected_aliases() == grown.aliases()
    grown.hold(version, reason="cannot tell")
    assert grown.aliases()["candidate"] == version


def test_what_counts_although_its_aliases_cannot_be_written_says_so(grown, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched, pytest.raises(InputError, match="so it counts: do not repeat it"):
        patched.setattr("perdure.workspace.replace_text", full)
        grown.rollback()
    assert Workspace.open(grown.folder).resolve("champion") == "v001"


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
    path, head = grown.folder / "ledger.jsonl", grown.folder / "ledger.head"
    whole, before = path.read_bytes(), head.read_bytes()
    grown.append("verdict", version="v003")
    last = path.read_bytes()[len(whole) :]
    for cut in range(1, len(last)):
        path.write_bytes(whole + last[:-cut])
        head.write_bytes(before)
        again = Workspace.open(grown.folder)
        assert len(again.ledger()) == 3 and again.verify_ledger() == 3  # it was never acknowledged
        again.append("verdict", version="v003", cut=cut)
        assert again.verify_ledger() == 4 and again.ledger()[-1]["cut"] == cut
        assert path.read_bytes().startswith(whole)


def test_a_torn_first_line(workspace):
    path = workspace.folder / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:10])
    (workspace.folder / "ledger.head").unlink()
    workspace.append("init", version="v000")
    assert workspace.verify_ledger() == 1 and workspace.ledger()[0]["previous_line"] is None


def test_an_edited_last_line_and_missing_ones_are_found(grown):
    path = grown.folder / "ledger.jsonl"
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    path.write_bytes(whole.replace(b"v002", b"v001"))
    with pytest.raises(InputError, match=r"ledger\.jsonl:3: this line was altered"):
        grown.verify_ledger()
    path.write_bytes(b"\n".join(lines[:2]) + b"\n")
    for act in (grown.verify_ledger, lambda: grown.append("verdict", version="v003")):
        with pytest.raises(InputError, match=r"has 2 lines, but ledger\.head counts 3: lines were lost"):
            act()


def test_a_kill_between_line_and_head_is_no_damage(grown):
    head = grown.folder / "ledger.head"
    before = head.read_bytes()
    grown.append("verdict", version="v003")
    head.write_bytes(before)
    assert grown.verify_ledger() == 4
    grown.append("refuse", version="v003")
    assert grown.verify_ledger() == 5 and b'"lines": 5' in head.read_bytes()


def test_two_kills_between_line_and_head_in_a_row_are_no_damage(grown, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(path, text):
        raise Killed

    monkeypatch.setattr(ledger, "replace_text", killed)
    for _ in range(3):
        with pytest.raises(Killed):
            grown.append("verdict", version="v003")
    monkeypatch.undo()
    assert grown.verify_ledger() == 4  # the first one's line is there; the others stopped before theirs
    grown.append("verdict", version="v003")
    assert grown.verify_ledger() == 5


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
    grown.hold("v003", reason="few rows")
    before = (grown.folder / "aliases.json").stat()
    assert Workspace.open(grown.folder).aliases()["candidate"] == "v003"
    assert (grown.folder / "aliases.json").stat().st_mtime_ns == before.st_mtime_ns
    assert not (grown.folder / ".lock").exists()


def test_the_lock_heals_too(grown):
    (grown.folder / "aliases.json").write_text('{"champion": "v001", "previous": "v000"}', encoding="utf-8")
    with grown.lock():
        assert grown.aliases()["champion"] == "v002"


def test_two_writers_take_turns(workspace: Workspace):
    """A rollback while a stage writes: no line is lost, and the chain holds."""
    threads = [
        threading.Thread(target=lambda n=n: [workspace.append("note", by=n) for _ in range(25)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert workspace.verify_ledger() == 101
