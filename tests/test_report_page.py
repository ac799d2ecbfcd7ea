"""The page: complete, self-contained, the same for the same files, and safe from what models and data sets wrote."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fake_workspace
from fake_workspace import PRIOR, FakeWorkspace, add_stage, chain_of_three, page_of
from perdure.files import write_jsonl
from perdure.report import charts, process, samples
from perdure.report.html import write_report
from perdure.types import InputError


@pytest.fixture
def chain(tmp_path: Path) -> FakeWorkspace:
    return chain_of_three(tmp_path / "bot")


class Outline(HTMLParser):
    """Tags, attributes that load or link, and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "action", "data", "poster", "srcset", "background")
        self.links += [value or "" for name, value in attrs if name in names]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    return found


HOSTILE = (
    '<script>alert(1)</script><img src="http://evil.test/x.png" onerror=alert(2)> \x1b[31mred\x1b[0m \u202egnp.exe'
)


def hostile_chain(folder: Path) -> FakeWorkspace:
    """Every text that a model or a data set may have written tries to break out."""
    fake = FakeWorkspace(folder)
    rows = [row | {"prompt": HOSTILE, "expected": HOSTILE, "completion": HOSTILE + "{{ 7*7 }}"}
            for row in fake_workspace.items("a", 9, 10)]  # fmt: skip
    table = [{"name": HOSTILE, "kind": HOSTILE, "before": "<b>", "after": None, "change": True, "passed": "yes"}]
    add_stage(fake, "a", {"a": 9}, base={"a": 0}, changed={"a": rows}, reasons=[HOSTILE], table=table)
    run = fake.workspace.run_folder("s01-a")
    asked = [row | {"prompt": HOSTILE} for row in fake_workspace.items("a", 0, 10)]
    write_jsonl(run / "baseline" / "a.jsonl", asked)
    path = run / "preflight.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"advice": [HOSTILE], "window": {"limit": HOSTILE}}))
    fake.workspace.append("note", version=HOSTILE, reason=HOSTILE)
    return fake


def test_kinds_of_test_rows_are_shown_below_their_skill(chain):
    """The newest version's score names them; the base model was not measured by kind."""
    path = chain.folder / "versions" / "v003" / "version.json"
    info = json.loads(path.read_text())
    info["scores"]["a"]["kinds"] = {"direct": {"accuracy": 0.75, "n": 4}, "<indirect>": {"accuracy": 0.5, "n": 6}}
    info["scores"]["b"]["kinds"] = {"only": {"accuracy": 0.6, "n": 10}}
    path.write_text(json.dumps(info))
    text = " ".join(outline(page_of(chain)).text.split())
    assert "of these: direct (n = 4)–75%" in text and "of these: <indirect> (n = 6)–50%" in text
    assert "of these: only" not in text


def test_foreign_text_is_escaped(tmp_path):
    page = page_of(hostile_chain(tmp_path / "bot"))
    found = outline(page)
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert "<script>alert(1)</script>" in found.text  # readable as text
    assert "{{ 7*7 }}" in found.text
    assert "red" in found.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)


def test_a_lone_surrogate_does_not_stop_the_report(chain):
    path = chain.folder / "versions" / "v003" / "evaluation" / "a.jsonl"
    rows = [json.loads(line) | {"completion": "\ud800 half"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "\ufffd half" in page_of(chain)


def test_the_page_needs_nothing_else(chain):
    page = page_of(chain)
    found = outline(page)
    assert all(link.startswith("#") for link in found.links)
    assert {"script", "link", "img", "iframe", "object", "embed", "form"}.isdisjoint(found.tags)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page
    assert not re.search(r"https?://", page)


def test_every_section_is_there_and_every_link_has_its_target(chain):
    rival = FakeWorkspace(chain.folder / "compare" / "sft", "sft")
    add_stage(rival, "a", {"a": 10, "b": 3, "c": 1}, base={"a": 0, "b": 5, "c": 1})
    page = page_of(chain)
    ids = re.findall(r'<section id="(\w+)"', page)
    assert ids == ["matrix", "comparison", "prior", "verdicts", "samples", "curves", "preflight", "cost", "versions",
                   "settings"]  # fmt: skip
    assert {link.removeprefix("#") for link in outline(page).links} == set(ids)
    # 3 stages of 4 curves, 2 dumbbells, 3 + 1 cost bars
    assert page.count("<svg") == 12 + 2 + 4


def test_refused_candidates_are_struck_and_flagged(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    add_stage(fake, "a", {"a": 9, "b": 4}, base={"a": 0, "b": 5})
    add_stage(fake, "b", {"a": 2, "b": 9}, decision="refused", reasons=["a: got worse."])
    page = page_of(fake)
    row = re.search(r'<tr class="candidate">.*?</tr>', page, re.DOTALL)
    assert row is not None
    assert "refused" in row[0]
    assert "20%" in row[0]
    assert "a: got worse." in page
    taught = re.findall(r'class="heat \w* taught[^>]*><b>([^<]+)</b>', page)
    assert taught == ["90%"]


def test_same_files_same_page(chain):
    assert page_of(chain) == page_of(chain)


def test_target(chain, tmp_path):
    target = tmp_path / "out.html"
    assert write_report(chain.folder, target) == target
    assert target.stat().st_size > 10_000
    assert not (chain.folder / "report.html").exists()
    with pytest.raises(InputError, match="cannot be written"):
        write_report(chain.folder, tmp_path / "missing" / "out.html")


def test_a_long_chain_stays_small(tmp_path):
    names = [f"skill-{number}" for number in range(12)]
    fake = FakeWorkspace(tmp_path / "bot", n=100)
    for number, name in enumerate(names):
        stage = fake.start(name)
        if number == 0:
            fake.baseline(stage, dict.fromkeys(names, 3), PRIOR)
        fake.metrics(stage, steps=1000)
        fake.candidate(stage, dict.fromkeys(names[: number + 1], 90) | dict.fromkeys(names[number + 1 :], 4), PRIOR)
    assert write_report(fake.folder).stat().st_size < 500_000


# Charts and samples


def test_thinning_keeps_extremes():
    line = [(float(x), 1.0) for x in range(10_000)]
    line[4321], line[8765] = (4321.0, 9.0), (8765.0, -9.0)
    kept = charts.thinned(line)
    assert len(kept) <= charts.MAX_POINTS + 1
    assert {line[0], line[4321], line[8765], line[-1]} <= set(kept)
    assert kept == sorted(kept)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_cover_the_range(low, size):
    ticks = charts.nice_ticks(low, low + size)
    assert 2 <= len(ticks) <= 6
    assert ticks[0] <= low + 1e-6 * max(1, abs(low))
    assert ticks[-1] >= low + size - 1e-6 * max(1, abs(low) + size)


def test_a_line_chart_in_known_places():
    series = charts.Series("SDFT", [(0, 0.0), (10, 1.0)], "ours")
    chart = charts.line_chart("Accuracy", [series], share=True, shade_until=5)
    assert chart is not None
    assert chart.curves[0].points == "40,128 232,8"
    assert chart.shade == (40, 96)
    assert chart.last == "100%"
    assert charts.line_chart("Nothing", [charts.Series("SDFT", [], "ours")], share=True) is None


def test_earlier_skills_are_listed_by_how_far_they_were_pulled(tmp_path: Path):
    lines = [{"step": 1, "moved": {"a": 0.1, "b": 0.4}}, {"step": 2, "moved": {"a": 0.7, "b": 0.2, "<c>": 0.05}},
             {"step": 3, "moved": {"a": None}}, {"step": 4, "moved": 3}, {"step": 5}]  # fmt: skip
    assert process.pulled(lines) == [("a", 0.7), ("b", 0.4), ("<c>", 0.05)]
    workspace = chain_of_three(tmp_path / "bot")
    run = next(path for path in (tmp_path / "bot" / "runs").iterdir() if path.name.startswith("s03"))
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({**json.loads(line), **lines[1]}) + "\n" for line in
                               metrics.read_text().splitlines()))  # fmt: skip
    page = write_report(tmp_path / "bot").read_text()
    assert "their anchor rows had moved: a 0.70, b 0.20, &lt;c&gt; 0.05." in page and workspace


def test_stacked_bar():
    found = charts.stacked({"train": 30.0, "probe": 0.0, "evaluate": 10.0}, 80)
    assert [(part.kind, part.at, part.width) for part in found] == [("train", 0, 37.5), ("evaluate", 37.5, 12.5)]


def test_samples_show_failures_and_changes():
    def pairs(change: str, number: int) -> list[samples.Sample]:
        return [samples.Sample(change, f"{change} {i}", "", "", "", False, False) for i in range(number)]

    shown = samples.choose([*pairs("right", 50), *pairs("gained", 40), *pairs("lost", 1), *pairs("wrong", 9)])
    assert [pair.change for pair in shown] == ["gained", "gained", "lost", "wrong", "right"]
    assert [pair.prompt for pair in shown[:2]] == ["gained 0", "gained 20"]
    assert len(samples.choose(pairs("gained", 40))) == 4
    assert len(samples.choose(pairs("gained", 1))) == 1
    assert samples.clipped("x" * 705).endswith("… (5 more characters)")
