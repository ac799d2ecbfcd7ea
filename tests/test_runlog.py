"""What a stage writes while it trains, and how it is cut back to a checkpoint."""

import json

import pytest

from perdure.runlog import FILES, Clock, LoopState, RunLog
from perdure.types import InputError


def lines(log: RunLog, name: str) -> list[dict]:
    return [json.loads(line) for line in (log.folder / name).read_text(encoding="utf-8").split("\n")[:-1]]


def step(log: RunLog, number: int) -> None:
    log.metrics({"step": number, "loss": number / 7}, {"step": number, "seconds": {"rollout": 0.1}})
    log.sample({"step": number, "completion": f"größer\u2028{number}"})


def test_lines_reach_their_files_and_the_reporter(tmp_path):
    heard = []
    log = RunLog(tmp_path / "runs" / "s01", lambda line, timings: heard.append((line, timings)))
    step(log, 1)
    log.metrics({"step": 1, "validation_accuracy": 0.5})
    assert lines(log, "metrics.jsonl") == [{"step": 1, "loss": 1 / 7}, {"step": 1, "validation_accuracy": 0.5}]
    assert lines(log, "timings.jsonl") == [{"step": 1, "seconds": {"rollout": 0.1}}]
    assert lines(log, "samples.jsonl") == [{"step": 1, "completion": "größer\u20281"}]
    assert heard == [({"step": 1, "loss": 1 / 7}, {"step": 1, "seconds": {"rollout": 0.1}}),
                     ({"step": 1, "validation_accuracy": 0.5}, {})]  # fmt: skip


@pytest.mark.parametrize("torn", [0, 5])
def test_rewind_cuts_to_the_checkpoint_to_the_byte(tmp_path, torn):
    log = RunLog(tmp_path, None)
    for number in (1, 2):
        step(log, number)
    positions = log.positions()
    whole = {name: (tmp_path / name).read_bytes() for name in FILES}
    for number in (3, 4):
        step(log, number)
    later = {name: (tmp_path / name).read_bytes() for name in FILES}
    for name in FILES:  # a kill may have torn the last line
        (tmp_path / name).write_bytes(later[name][: len(later[name]) - torn])
    again = RunLog(tmp_path, None)
    again.rewind(json.loads(json.dumps(positions)))
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == whole
    for number in (3, 4):
        step(again, number)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == later


def test_rewind_without_a_checkpoint_empties(tmp_path):
    log = RunLog(tmp_path, None)
    log.rewind({})
    assert log.positions() == dict.fromkeys(FILES, 0)
    step(log, 1)
    log.rewind({})
    assert log.positions() == dict.fromkeys(FILES, 0)


def test_a_file_that_lost_lines_is_not_filled_with_zeros(tmp_path):
    log = RunLog(tmp_path, None)
    step(log, 1)
    positions = log.positions()
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match=r"metrics\.jsonl: shorter than when the checkpoint"):
        log.rewind(positions)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="begin this stage anew"):
        log.rewind(positions)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_clock_adds_up_laps_of_a_part(monkeypatch):
    times = iter([10.0, 11.0, 13.5, 14.0])
    monkeypatch.setattr("perdure.runlog.time.perf_counter", lambda: next(times))
    clock = Clock()
    for part in ("student", "loss", "student"):
        clock.lap(part)
    assert clock.seconds == {"student": 1.5, "loss": 2.5}


def test_states_do_not_share_their_counts():
    LoopState().tokens["rollout"] = 5
    assert LoopState().tokens["rollout"] == 0
