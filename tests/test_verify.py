"""``perdure verify``: any changed byte of versions, skills, ledger and aliases is found and named; nothing crashes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perdure.cli import app
from perdure.skills.base import content_hash, skill_files
from perdure.types import InputError
from perdure.verify import verify
from perdure.workspace import Workspace
from toy_versions import info, new_workspace, write_skill, write_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three versions introduced in the ledger as ``settle`` does, two of them promoted, each taught the kept skill."""
    workspace = new_workspace(tmp_path / "bot")
    source = write_skill(tmp_path / "toy")
    content = content_hash(skill_files(source))
    workspace.skills.keep(source, "toy", content)
    for number in (1, 2, 3):
        name, parent = f"v00{number}", f"v00{number - 1}"
        workspace.add_version(info(name, parent, "toy", content), write_weights)
        workspace.append("candidate", version=name, parent=parent, skill="toy")
        if number < 3:
            workspace.promote(name, "learned")
    return workspace.folder


def checked(folder: Path) -> list[Path]:
    """Every file that verify answers for."""
    files = [path for part in ("versions", "skills") for path in (folder / part).rglob("*") if path.is_file()]
    return sorted(files) + [folder / name for name in ("ledger.jsonl", "ledger.head", "aliases.json")]


def flip(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def edit(data: bytes, rng: random.Random) -> bytes:
    """A whole line doubled, taken out, or swapped with its neighbour."""
    lines = data.split(b"\n")
    place = rng.randrange(max(1, len(lines) - 1))
    how = rng.randrange(3)
    if how == 0:
        return b"\n".join([*lines[: place + 1], *lines[place:]])
    if how == 1:
        return b"\n".join([*lines[:place], *lines[place + 1 :]])
    return b"\n".join([*lines[:place], *lines[place : place + 2][::-1], *lines[place + 2 :]])


def insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.randrange(1, 9)) + data[place:]


Damage = Callable[[bytes, random.Random], bytes] | None
DAMAGE: list[Damage] = [flip, flip, truncate, edit, insert, None]
"""None: the file is removed."""


def test_an_untouched_workspace_has_no_problem(folder: Path) -> None:
    heard: list[tuple[int, int]] = []
    assert verify(folder, lambda done, total: heard.append((done, total))) == []
    assert heard[-1] == (5, 5)


def damages(files: list[Path], rng: random.Random) -> Iterator[tuple[Path, Damage]]:
    """Every damage of every file once, then two hundred at random."""
    yield from product(files, dict.fromkeys(DAMAGE))
    for _ in range(200):
        yield rng.choice(files), rng.choice(DAMAGE)


def damaged(good: bytes, how: Damage, rng: random.Random) -> bytes | None:
    """Other bytes, in any case: two equal lines that change places are no damage."""
    bad = good
    while bad == good:
        bad = how(good, rng) if how else None
    return bad


def assert_named(path: Path, problems: list[str], about: object) -> None:
    """A version's and a skill's own record is answered for by its folder, and both files of the ledger by it."""
    named = path.parent if path.name in ("train.jsonl", "test.jsonl", "skill.toml", "version.json") else path
    if path.name in ("ledger.jsonl", "ledger.head"):
        assert any("ledger" in problem for problem in problems), (about, path, problems)
    else:
        assert any(str(named) in problem for problem in problems), (about, path, problems)


def assert_no_command_breaks(folder: Path, path: Path) -> None:
    for words in (("status",), ("log",), ("show", "v2", "-w"), ("verify",), ("report", "--json")):
        done = CliRunner().invoke(app, [*words, str(folder)])
        assert done.exception is None or isinstance(done.exception, (InputError, SystemExit)), (path, words)


def test_damages_of_every_kind_are_all_found_and_no_command_breaks(folder: Path) -> None:
    rng, files = random.Random(0), checked(folder)
    assert len(files) >= 14
    aliases = folder / "aliases.json"
    for number, (path, how) in enumerate(damages(files, rng)):
        good, before = path.read_bytes(), aliases.read_bytes()
        bad = damaged(good, how, rng)
        if bad is None:
            path.unlink()
        else:
            path.write_bytes(bad)
        found = verify(folder)
        assert found, f"{number}: {how} of {path} was not found"
        assert_named(path, found, number)
        if number % 7 == 0:  # not a multiple of five: every kind of damage is among them
            assert_no_command_breaks(folder, path)
        path.write_bytes(good)
        aliases.write_bytes(before)
    assert verify(folder) == []


def test_what_was_put_there_or_taken_away_whole(folder: Path) -> None:
    (folder / "versions/v001/evaluation/more.jsonl").write_text("{}\n", encoding="utf-8")
    (folder / "versions/v009").mkdir()
    shutil.rmtree(folder / "versions/v003")
    kept = next((folder / "skills").iterdir())
    (kept / "notes.txt").write_text("x", encoding="utf-8")
    text = "\n".join(verify(folder))
    for part in ("more.jsonl: not of this version", "v009: no version", "v003: missing; the ledger names it",
                 "notes.txt: not of this skill"):  # fmt: skip
        assert part in text
    shutil.rmtree(kept)
    assert f"{kept}: missing; a version was taught it" in verify(folder)


def test_a_rewritten_version_is_found_although_its_own_list_fits(folder: Path) -> None:
    """Whoever changes a file and its hash in version.json has not changed the ledger."""
    weights, record = folder / "versions/v002/model.safetensors", folder / "versions/v002/version.json"
    weights.write_bytes(b"other")
    data = json.loads(record.read_text(encoding="utf-8"))
    from perdure.files import file_sha256

    data["files"]["model.safetensors"] = file_sha256(weights)
    record.write_text(json.dumps(data), encoding="utf-8")
    assert verify(folder) == [f"{record}: altered (its hash is not the one in the ledger)"]


def test_an_interrupted_stage_is_said_to_be_one(folder: Path) -> None:
    Workspace(folder).add_version(info("v004", "v002"), write_weights)
    (problem,) = [p for p in verify(folder) if "v004" in p]
    assert "not in the ledger: its stage was interrupted" in problem


def test_the_command(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["verify", str(folder)])
    assert done.exit_code == 0 and "as it was written" in done.output
    (folder / "versions/v001/model.safetensors").write_bytes(b"x")
    done = runner.invoke(app, ["verify", str(folder)])
    assert done.exit_code == 1 and "model.safetensors: altered" in done.output
    assert json.loads(runner.invoke(app, ["verify", str(folder), "--json"]).stdout)["problems"]
    assert isinstance(runner.invoke(app, ["verify", str(tmp_path)]).exception, InputError)
