"""The bench: chain files, runs that go on where they stopped, numbers that a hand can check, tables from files."""

from __future__ import annotations

import json
import random
import xml.dom.minidom
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import NUMBERS, save_tiny_model, toy_skill, two_toy_skills
from perdure.bench.chain_run import units_of
from perdure.bench.finished import best_rate, chosen_rates, results_so_far
from perdure.bench.numbers import _intervals, calibration, growth, summarise
from perdure.bench.plan import RunPlan, Source, load_chain, merged, runs_of, sweeps_of
from perdure.bench.plots import chain_plot
from perdure.bench.runner import _check_data, run_bench
from perdure.bench.sources import harder, skill_folder
from perdure.bench.tables import write_tables
from perdure.reporting import Silent
from perdure.skills.base import load_skill
from perdure.types import InputError
from test_cli import perdure

CHAIN = """
name = "toys"
seeds = [0]
reference = "sft"
skills = { colours = "colours", numbers = "numbers" }
orders = { a = ["colours", "numbers"] }
[settings]
model = { source = "MODEL", compute_dtype = "float32" }
context = { template = "turns:2" }
preflight = { rows = 4, forecast = false }
probe = { tasks = [] }
[settings.train]
steps = 6
batch_size = 8
warm_start_steps = 4
learning_rate = 3e-3
anchor_general_tokens = 2
anchor_rows = 4
validate_every = 3
validation_share = 0.2
[sweep]
rates = [1e-3, 3e-3]
[methods.sft]
label = "SFT <with> anchors"
settings.train = { method = "sft" }
[methods.sdft]
label = "SDFT"
sweep_as = "sft"
[methods.replay]
label = "Replay"
sweep_as = "sft"
settings.train = { method = "sft_replay" }
"""


def write_chain(folder: Path, *changes: tuple[str, str]) -> Path:
    model = save_tiny_model(folder / "model", copies=True)
    two_toy_skills(folder)
    text = CHAIN.replace("MODEL", str(model))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "toys.toml").write_text(text, encoding="utf-8")
    return folder / "toys.toml"


def test_other_data_is_not_mixed_with_what_was_run(tmp_path: Path) -> None:
    skills = {"colours": toy_skill(tmp_path / "colours"), "numbers": toy_skill(tmp_path / "numbers", NUMBERS)}
    chain = load_chain(write_chain(tmp_path / "chain"))
    _check_data(tmp_path, chain, {"colours": skills["colours"]})
    _check_data(tmp_path, chain, skills)
    (skills["numbers"] / "test.jsonl").write_text('{"prompt": "9", "completion": "odd"}\n')
    with pytest.raises(InputError, match="was run with other data of numbers"):
        _check_data(tmp_path, chain, skills)
    fewer = chain.model_copy(update={"skills": chain.skills | {"colours": Source(of="colours", rows=4)}})
    with pytest.raises(InputError, match="other data of colours, numbers"):
        _check_data(tmp_path, fewer, skills)


# The chain file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"numbers"] }', '"letters"] }', "no skill 'letters'"),
        ('["colours", "numbers"]', '["colours", "colours"]', "each once"),
        ('numbers = "numbers"', 'numbers = "nowhere"', "neither an importer nor a skill folder"),
        ('numbers = "numbers"', 'numbers = "colours"', "is called 'colours': call it so here"),
        ('sweep_as = "sft"', 'sweep_as = "replay"', "no other row with a sweep"),
        ('reference = "sft"', 'reference = "dft"', "no method 'dft'"),
        ("[methods.sdft]", '[methods."../sdft"]', "small letters, digits and hyphens"),
        ("\nsteps = 6", "\nstepz = 6", "stepz"),
        ('method = "sft_replay"', 'method = "sft_replay", kl_weight = 0.1', "sft_kl"),
        ("seeds = [0]", "seeds = []", "seeds"),
        ("seeds = [0]", "seeds = [0]\nspeed = 3", "speed"),
        ("[methods.sdft]", "[methods.sdft]\nlabl = 3", "methods.sdft.labl: there is no such setting"),
        ("seeds = [0]", "seeds = [0", "toys.toml:4"),
    ],
)
def test_a_wrong_chain_file_is_one_clear_error(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = write_chain(tmp_path, (old, new))
    with pytest.raises(InputError, match=r"toys\.toml") as caught:
        load_chain(file)
    assert message in str(caught.value)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "benchmarks" / "chains").glob("*.toml")))
def test_the_published_chain_files_can_be_run(file: Path) -> None:
    assert load_chain(file).name == file.stem


def test_runs_come_seed_by_seed_with_the_rates_of_their_sweeps(tmp_path: Path) -> None:
    chain = load_chain(write_chain(tmp_path, ("seeds = [0]", "seeds = [0, 1]")))
    plans = runs_of(chain, {"sft": 1e-3})
    assert [plan.key for plan in plans[:4]] == ["sft.a.0", "sdft.a.0", "replay.a.0", "sft.a.1"]
    assert [plan.config.train.learning_rate for plan in plans[:3]] == [1e-3, 1e-3, 1e-3]
    assert runs_of(chain, {})[0].config.train.learning_rate == 3e-3
    assert [plan.config.train.method for plan in plans[:3]] == ["sft", "sdft", "sft_replay"]
    assert not plans[0].config.gate.enforce and plans[0].config.seed == 0 and plans[3].config.seed == 1
    assert len({plan.identity for plan in plans}) == 6
    assert [(p.method, p.rate) for p in sweeps_of(chain)] == [("sft", 1e-3), ("sft", 3e-3)]
    assert all(plan.skills == ("colours",) for plan in sweeps_of(chain))


def test_a_fixed_rate_needs_no_sweep(tmp_path: Path) -> None:
    chain = load_chain(write_chain(tmp_path, ('label = "SDFT"\nsweep_as = "sft"', 'label = "SDFT"\nrate = 5e-4')))
    assert {plan.method for plan in sweeps_of(chain)} == {"sft"}
    rates = {plan.method: plan.config.train.learning_rate for plan in runs_of(chain, {"sft": 1e-3, "sdft": 9.0})}
    assert rates == {"sft": 1e-3, "sdft": 5e-4, "replay": 1e-3}


def test_later_sections_win_key_by_key() -> None:
    assert merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": {"z": 4}}) == {"a": {"x": 1, "y": 3}, "b": {"z": 4}}


def test_an_imported_skill_is_called_as_the_chain_file_calls_it(tmp_path: Path) -> None:
    folder = skill_folder(tmp_path / "out", tmp_path, "my-orders", Source(of="forms-order"))
    assert load_skill(folder).name == "my-orders" and len(load_skill(folder).train) > 100
    folder.rename(folder.with_name(".my-orders"))  # as if it had been stopped before the folder was there
    assert load_skill(skill_folder(tmp_path / "out", tmp_path, "my-orders", Source(of="forms-order"))).test


def test_a_harder_source_changes_training_rows_alone(tmp_path: Path) -> None:
    origin = load_skill(toy_skill(tmp_path / "colours"))
    folder = skill_folder(tmp_path / "out", tmp_path, "few", Source(of="colours", rows=10, noise=0.4))
    found = load_skill(folder)
    assert found.name == "few" and found.test == tuple(replace(e, origin=e.origin.replace(str(tmp_path / "colours"),
        str(folder))) for e in origin.test)  # fmt: skip
    assert [e.messages for e in found.train] == [e.messages for e in origin.train[:10]]
    answers = [(e.demonstration or {})["content"] for e in found.train]
    truth = [(e.demonstration or {})["content"] for e in origin.train[:10]]
    assert sorted(answers) == sorted(truth) and 1 <= sum(a != t for a, t in zip(answers, truth, strict=True)) <= 4
    assert skill_folder(tmp_path / "out", tmp_path, "few", Source(of="colours", rows=10, noise=0.4)) == folder
    assert skill_folder(tmp_path / "out", tmp_path, "own", Source(of="colours")) == tmp_path / "colours"
    rows = [{"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": f"a{n}"}]}
            for n in range(4)]  # fmt: skip
    mixed = harder(rows, Source(of="x", noise=0.9), random.Random(0))
    assert sum(a["messages"] != b["messages"] for a, b in zip(rows, mixed, strict=True)) == 4
    assert rows[0]["messages"][-1]["content"] == "a0"


# Runs


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("bench")
    file, out = write_chain(folder), folder / "out"
    return file, out, run_bench(load_chain(file), file, out, 2, [], [], Silent())


def test_every_run_ends_with_its_numbers_and_without_weights(ran: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    _, out, results = ran
    assert [result["key"] for result in results] == ["sft.a.0", "sdft.a.0", "replay.a.0"]
    for result in results:
        assert [stage["skill"] for stage in result["stages"]] == ["colours", "numbers"]
        assert all(len(stage[key]) == 8 for stage in result["stages"] for key in ("before", "learned", "final"))
        assert result["stages"][-1]["learned"] == result["stages"][-1]["final"]
        assert result["drift"] > 0 and result["stages"][0]["steps"] == 6 and result["threads"] >= 1
        assert bool(result["stages"][0]["preflight"]) is (result["method"] == "sdft")
    assert not list(out.rglob("*.safetensors"))
    base = json.loads((out / "base.json").read_text())
    assert base["skills"].keys() == {"colours", "numbers"} and base["probe"] == {}


def test_a_row_may_have_the_gate_and_what_it_refuses_counts_as_not_learned(tmp_path: Path) -> None:
    file = write_chain(
        tmp_path, ('[methods.sft]\nlabel = "SFT <with> anchors"', '[methods.sft]\nlabel = "SFT"\nrate = 1e-9\n'
                   'settings.gate = { enforce = true, repair = 0 }'),
        ('sweep_as = "sft"', "rate = 3e-3"),
    )  # fmt: skip
    chain = load_chain(file)
    results = run_bench(chain, file, tmp_path / "out", 1, ["sft", "replay"], [0], Silent())
    gated, free = sorted(results, key=lambda found: found["method"], reverse=True)
    assert [s["promoted"] for s in gated["stages"]] == [False, False]  # nothing is learned at such a rate
    assert all(s["learned"] == s["before"] == s["final"] for s in gated["stages"])
    assert [s["promoted"] for s in free["stages"]] == [True, True]
    found = summarise(results, {"skills": {s["skill"]: s["before"] for s in free["stages"]}, "probe": {}}, "sft")
    assert found["rows"]["sft"]["learned"][0] == found["rows"]["sft"]["final"][0]
    assert found["growth"]["sft"][1]["first"] is None  # a skill that was refused is none that could be kept


def test_the_rate_is_the_one_that_validates_best(ran: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    file, out, results = ran
    sweeps = sweeps_of(load_chain(file))
    found = [json.loads((out / "runs" / plan.key / "result.json").read_text()) for plan in sweeps]
    best = max(result["stages"][0]["validation"] for result in found)
    rate = min(result["rate"] for result in found if result["stages"][0]["validation"] == best)
    assert chosen_rates(load_chain(file), sweeps, out) == {"sft": rate}
    assert {result["method"]: result["rate"] for result in results} == {"sft": rate, "sdft": rate, "replay": rate}


def test_a_rate_that_drifts_too_far_is_left_out() -> None:
    def swept(rate: float, validation: float, drift: float | None) -> dict[str, Any]:
        return {"rate": rate, "stages": [{"validation": validation, "kl_start": drift}]}

    runs = [swept(4e-4, 0.9, 0.5), swept(1e-4, 0.3, 0.1), swept(2e-4, 0.6, 0.2), swept(3e-4, 0.6, 0.25)]
    assert best_rate(runs, None) == 4e-4
    assert best_rate(runs, 0.3) == 2e-4  # of equals the smallest
    assert best_rate(runs, 0.15) == 1e-4
    assert best_rate(runs, 0.05) == 1e-4  # none stays below: the least
    assert best_rate([swept(1e-4, 0.3, None), swept(2e-4, 0.6, None)], 0.1) == 2e-4  # not known: not limited


def test_the_same_call_repeats_nothing_and_a_changed_file_is_refused(
    ran: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    file, out, results = ran
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    chain = load_chain(file)
    assert run_bench(chain, file, out, 1, [], [], Silent()) == results == results_so_far(chain, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(InputError, match="has no dft, 7"):
        run_bench(chain, file, out, 1, ["dft"], [7], Silent())
    (other := file.with_name("other.toml")).write_text(file.read_text().replace("\nsteps = 6", "\nsteps = 7"))
    with pytest.raises(InputError, match="other settings"):
        results_so_far(load_chain(other), out)


def test_tables_and_plots_are_made_from_the_files(ran: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    file, out, results = ran
    found = write_tables(load_chain(file), out, results)
    assert json.loads((out / "results.json").read_text())["rows"] == found["rows"]
    text = (out / "results.md").read_text()
    assert "| SDFT | " in text and "Paired difference to SFT <with> anchors" in text
    for name in ("kept.svg", "rest.svg", "cost.svg", "chain.svg"):
        drawn = xml.dom.minidom.parse(str(out / name))  # an unescaped label would not parse
        assert len(drawn.getElementsByTagName("circle")) >= 3
    with pytest.raises(InputError, match="no finished run"):
        write_tables(load_chain(file), out, [])


def test_the_command_shows_what_is_finished(ran: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    file, out, _ = ran
    done = perdure("bench", file, "--out", out, "--tables")
    assert done.returncode == 0 and "| SDFT | " in done.stdout, done.stderr
    assert json.loads(perdure("bench", file, "--out", out, "--tables", "--json").stdout)["chain"] == "toys"
    missing = perdure("bench", file.with_name("none.toml"), "--out", out)
    assert missing.returncode == 2 and "none.toml" in missing.stderr and "Traceback" not in missing.stderr


# Numbers


def stage(skill: str, before: str, learned: str, final: str, gap: float | None = None) -> dict[str, Any]:
    return {
        "skill": skill, "before": before, "learned": learned, "final": final, "seconds": {"train": 30.0},
        "scores": {skill: learned.count("1") / len(learned)}, "tokens": {"student": 10, "teacher": 5},
        "preflight": None if gap is None else {"gap": gap},
    }  # fmt: skip


def result(method: str, *stages: dict[str, Any], seed: int = 0, probe: str = "1100") -> dict[str, Any]:
    return {"method": method, "order": "a", "seed": seed, "stages": list(stages), "probe": {"piqa": probe},
            "drift": 0.5}  # fmt: skip


def _with_x(later: dict[str, Any]) -> dict[str, Any]:
    return later | {"scores": later["scores"] | {"x": 0.75, "again": 0.5}}


BASE = {"skills": {"x": "0000", "y": "1000"}, "probe": {"piqa": "1110"}}


def test_the_metrics_are_those_of_the_definitions() -> None:
    found = summarise(
        [result("m", stage("x", "0000", "1111", "1110"), _with_x(stage("y", "1100", "1110", "1110")))], BASE, "m"
    )
    row = {key: value and value[0] for key, value in found["rows"]["m"].items() if key != "runs"}
    assert row == {
        "learned": 0.875, "final": 0.75, "retention": 0.75, "forgetting": 0.25, "backward_transfer": -0.25,
        "forward_transfer": 0.25, "prior_change": -0.25, "drift": 0.5, "minutes": 1.0, "tokens": 30.0,
    }  # fmt: skip
    assert found["rows"]["m"]["drift"] == [0.5, None, None]  # one run: nothing to resample
    low, high = found["rows"]["m"]["final"][1:]
    assert low < 0.75 < high
    assert found["skills"]["m"] == {"x": {"learned": 1.0, "final": 0.75}, "y": {"learned": 0.75, "final": 0.75}}
    assert found["base"]["prior"] == 0.75


def test_differences_are_paired_over_items_and_runs() -> None:
    """Two methods that answer alike differ by nothing, however wide their own intervals."""
    mixed = "10" * 20
    base = {"skills": {"x": "0" * 40, "y": "0" * 40}, "probe": {"piqa": mixed}}
    both = (stage("x", "0" * 40, mixed, mixed), _with_x(stage("y", "0" * 40, mixed, mixed)))
    runs = [result(name, *both, seed=seed, probe=mixed) for name in ("a", "b") for seed in (0, 1)]
    found = summarise(runs, base, "a")
    assert found["rows"]["b"]["final"][2] - found["rows"]["b"]["final"][1] > 0.1
    assert found["differences"] == {"b": {key: [0.0, 0.0, 0.0] for key in found["differences"]["b"]}}
    # A run that only one of the two has does not count.
    worse = (stage("x", "0" * 40, "0" * 40, "0" * 40), _with_x(stage("y", "0" * 40, "0" * 40, "0" * 40)))
    found = summarise([*runs, result("b", *worse, seed=2, probe=mixed)], base, "a")
    assert found["differences"]["b"]["final"][0] == 0 and found["rows"]["b"]["final"][0] < 0.5


def test_the_same_numbers_come_out_again() -> None:
    runs = [
        result("m", stage("x", "0000", "1111", "1100"), _with_x(stage("y", "1000", "1110", "1110")), seed=s)
        for s in (0, 1)
    ]
    assert summarise(runs, BASE, "m") == summarise(runs, BASE, "m")


def test_items_that_are_not_independent_are_drawn_together() -> None:
    """Ten prompts, four rows of each, all of a prompt alike: as uncertain as ten items, not as forty."""
    bits = "".join(bit * 4 for bit in "1010101010")
    runs, base = [result("m", stage("x", "0" * 40, bits, bits))], {"skills": {"x": "0" * 40}, "probe": {"piqa": "1110"}}
    items = [f"{place}" for place in range(40)]
    prompts = units_of(items, {item: items[place // 4 * 4] for place, item in enumerate(items)})
    assert prompts == [place // 4 for place in range(40)] and units_of(items, {}) == list(range(40))

    def wide(**more: Any) -> float:
        mean, low, high = summarise(runs, base | more, "m")["rows"]["m"]["final"]
        assert mean == 0.5
        return high - low

    assert wide(units={"x": units_of(items, {})}) == wide()
    assert wide(units={"x": prompts}) == pytest.approx(2 * wide(), rel=0.15)
    # Of unlike sizes: one prompt with most of the rows, and a mean that is still over rows.
    assert wide(units={"x": [0] * 20 + list(range(1, 21))}) > wide()


def test_a_few_runs_are_judged_by_students_t_and_one_by_its_items() -> None:
    at = [{"final": value} for value in (0.1, 0.2, 0.3)]
    still = _intervals([at] * 50, ["final"])["final"]
    assert still == pytest.approx([0.2, 0.2 - 4.3027 * 0.1 / 3**0.5, 0.2 + 4.3027 * 0.1 / 3**0.5], abs=1e-4)
    rng = np.random.default_rng(0)
    shifted = [[{"final": run["final"] + shift} for run in at] for shift in rng.normal(0, 0.2, 2000)]
    assert _intervals([at, *shifted], ["final"])["final"][2] - 0.2 == pytest.approx(
        np.hypot(4.3027 * 0.1 / 3**0.5, 1.96 * 0.2), rel=0.05
    )
    one = _intervals(
        [[at[0]], *([run] for run in ({"final": 0.0}, {"final": 0.2}))],
        [
            "final",
        ],
    )["final"]
    assert one[0] == 0.1 and 0 <= one[1] < 0.01 and 0.19 < one[2] <= 0.2
    assert _intervals([[{"drift": 0.5}]] * 9, ["drift"])["drift"] == [0.5, None, None]
    assert _intervals([[{"final": float("nan")}]] * 9, ["final"])["final"] is None


def test_growth_follows_the_number_of_skills() -> None:
    first, second = stage("x", "0000", "1111", "1110"), stage("y", "0000", "1100", "1100")
    second |= {"scores": {"x": 0.75, "y": 0.5}, "seconds": {"train": 10.0, "probe": 4.0}}
    found = growth([result("m", first, second), result("m", first, second | {"scores": {"x": 0.25, "y": 0.5}}, seed=1)])
    assert found == [
        {"skills": 1, "average": 1.0, "first": None, "earlier": None, "train": 30.0, "rest": 0.0},
        {"skills": 2, "average": 0.5, "first": 0.5, "earlier": 0.5, "train": 10.0, "rest": 4.0},
    ]
    never = stage("x", "0000", "0000", "0000")
    assert growth([result("m", never, second)])[1]["first"] is None  # nothing learned, nothing to keep


def test_lines_of_a_chain_end_where_their_labels_are() -> None:
    rows = {"a": (1.0, 0.5), "b": (0.8, 0.5), "c": (0.2, None)}
    growth = {name: [{"average": value} for value in values] for name, values in rows.items()}
    drawn = xml.dom.minidom.parseString(
        chain_plot("t", {"growth": growth, "labels": {"a": "A", "b": "B <with>", "c": "C"}})
    )
    lines = [line.getAttribute("points").split() for line in drawn.getElementsByTagName("polyline")]
    ends = [tuple(map(float, line[-1].split(","))) for line in lines]
    assert ends[0] == ends[1] and ends[0][1] < ends[2][1]  # higher is better, and up
    labels = {node.firstChild.data: float(node.getAttribute("y")) for node in drawn.getElementsByTagName("text")}
    assert labels["B <with>"] - labels["A"] >= 14 and labels["C"] > labels["B <with>"]


def test_calibration_ranks_predicted_against_realised_gain() -> None:
    gains = [("0000", "1000", 0.1), ("0000", "1100", 0.4), ("0000", "1111", 0.9)]
    runs = [result("m", stage("x", before, learned, learned, gap)) for before, learned, gap in gains]
    fit = calibration(runs)
    assert fit is not None and fit["rank_correlation"] == pytest.approx(1) and fit["n"] == 3
    assert [point["gain"] for point in fit["points"]] == [0.25, 0.5, 1.0]
    assert calibration(runs[:2]) is None
    same = calibration([result("m", stage("x", "0000", "1000", "1000", 0.5))] * 3)
    assert same is not None and same["rank_correlation"] is None


def test_the_base_is_measured_again_for_a_skill_that_only_another_order_has() -> None:
    plan = RunPlan("k", "m", "M", "a", ("x",), 0, {})
    assert plan.base_identity(["x", "y"]) == plan.base_identity({"y": 1, "x": 2}) != plan.base_identity(["x"])
