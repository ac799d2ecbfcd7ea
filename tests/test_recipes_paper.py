"""The paper's tasks: settings within its grid, and builders on look-alikes of the published files."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from perdure.config import RunConfig, load_config, with_settings
from perdure.importers import run_importer
from perdure.skills.base import Skill, load_skill
from perdure.templates import parse_template
from perdure.types import Example, InputError

RECIPE = Path(__file__).parents[1] / "recipes" / "paper"
TASKS = ("science", "tools", "medical", "wikipedia")


@pytest.fixture(scope="module")
def build() -> Iterator[ModuleType]:
    """The script as a module; beside it lies the one that it imports."""
    spec = importlib.util.spec_from_file_location("recipes_paper_build", RECIPE / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(RECIPE))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(RECIPE))
        sys.modules.pop("published", None)


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def listed(path: Path, rows: list[Any]) -> Path:
    """As the hub's and GitHub's .json files are: one list over many lines."""
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return path


def arrow(folder: Path, rows: list[dict[str, Any]]) -> None:
    """As ``datasets`` saves a folder: a stream, and two files of its own."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text("{}")


def checked(folder: Path) -> Skill:
    """The skill, with every demonstration graded 1."""
    skill = load_skill(folder)
    for example in (*skill.train, *skill.test):
        assert skill.grade(said(example), example) == 1
    return skill


def said(example: Example) -> str:
    assert example.demonstration is not None
    return example.demonstration["content"]


# ---- settings


@pytest.mark.parametrize("task", TASKS)
def test_settings_are_of_the_papers_grid(task: str) -> None:
    config = load_config(RECIPE / f"{task}.toml")
    train = config.train
    assert config.model.source == "Qwen/Qwen2.5-7B-Instruct"
    assert (train.method, train.divergence, train.teacher, train.anchor_share) == ("sdft", "forward_kl", "ema", 0)
    assert train.learning_rate in (5e-6, 1e-5, 5e-5) and train.batch_size in (16, 32, 64)
    assert train.teacher_update_rate in (0.01, 0.02, 0.05) and train.teacher_temperature == 1
    assert (train.warmup_steps, train.weight_decay, train.max_grad_norm) == (10, 0, 1)
    assert (train.warm_start_steps, train.demonstration_weight) == (0, 0)
    assert parse_template(config.context.template)
    assert f"recipes/paper/{task}.toml" in (RECIPE / f"{task}.toml").read_text()


def test_the_supervised_run_of_the_readme_can_be_set() -> None:
    config = load_config(RECIPE / "science.toml")
    changed = with_settings(config, ["train.method=sft", "train.skip_first_tokens=0", "train.steps=80"])
    assert isinstance(changed, RunConfig) and changed.train.method == "sft"


# ---- science


def question(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": {"default": "Choose."},
        "question": f"How many atoms has compound {number}?",
        "choices": {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number % 4],
        "type": "mcq-4-choices",
        "domain": "Chemistry",
        "details": {"level": "L3", "task": "counting", "subtask": "atoms"},
        "answer": "",
    } | changes


OTHERS = [
    question(90, details={"level": "L1", "task": "reading"}),
    question(91, domain="Biology"),
    question(92, type="filling", choices={"text": [], "label": []}, answerKey="", answer="2 H2O"),
]


def test_science_keeps_the_multiple_choice_of_level_3(
    build: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "test.jsonl", [*OTHERS, *map(question, range(20)), question(3)])
    assert build.main(["science", str(tmp_path / "science"), "--data", str(data)]) == 0
    assert "16 rows to learn, 4 to test; left out: 2 not chemistry of level 3; 1" in capsys.readouterr().out
    skill = checked(tmp_path / "science")
    example = skill.test[0]
    assert [turn["role"] for turn in example.messages] == ["system", "user"]
    assert "\n\nA: one\nB: two\nC: three\nD: four" in example.messages[1]["content"]
    right = said(example).split("\n")[1]
    wrong = "ABCD"[("ABCD".index(right) + 1) % 4]
    answers = {
        f"<reasoning>It is {wrong}, <answer>\n{wrong}\n</answer>, no.</reasoning>\n<answer> {right} </answer>": 1,
        f"<answer>{right}</answer> or <answer>{wrong}</answer>": 0,
        f"<answer>{right}: one</answer>": 0,
        right: 1,
        wrong: 0,
        f"It is {right}": 0,
    }
    assert {answer: skill.grade(answer, example) for answer in answers} == answers


def test_the_split_is_the_seeds(build: ModuleType, tmp_path: Path) -> None:
    data = lines(tmp_path / "test.jsonl", [question(n) for n in range(20)])
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build.science(tmp_path / name, data, seed)
    of = {name: (tmp_path / name / "test.jsonl").read_bytes() for name in "abc"}
    assert of["a"] == of["b"] != of["c"]


def test_every_form_of_file_gives_the_same_skill(build: ModuleType, tmp_path: Path) -> None:
    rows = [question(n) for n in range(10)]
    (tmp_path / "folder" / ".cache").mkdir(parents=True)
    lines(tmp_path / "folder" / "a.jsonl", rows[:5])
    listed(tmp_path / "folder" / "b.json", rows[5:])
    (tmp_path / "folder" / ".cache" / "c.json").write_text("not data")
    (tmp_path / "folder" / "README.md").write_text("not data")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    arrow(tmp_path / "saved", rows)
    lines(tmp_path / "lines.json", rows)
    made = set()
    for name in ("folder", "rows.parquet", "saved", "lines.json"):
        build.science(tmp_path / "skills" / name, tmp_path / name)
        made.add((tmp_path / "skills" / name / "train.jsonl").read_bytes())
    assert len(made) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (question(1, answerKey="E"), r"'answerKey' is 'E', the labels are A, B, C, D"),
        (question(1, choices={"text": ["one"], "label": ["A", "B"]}), "equally long"),
        (question(1, choices={"text": ["one", " "], "label": ["A", "B"]}), "not empty"),
        (question(1, choices={"text": ["one", "two"], "label": ["A", "A"]}), "repeat: A, A"),
        (question(1, choices=None), "'choices' must hold"),
        (question(1, question=7), "'question' must be a text, found int"),
        (question(1, details="L3"), "no object 'details'"),
        ({"details": {"level": "L3"}, "domain": "Chemistry"}, "no 'type'; its keys are details, domain"),
        ([1], "expected an object, found list"),
    ],
)
def test_bad_science_rows_are_named_with_their_line(build: ModuleType, tmp_path: Path, row: Any, message: str) -> None:
    rows = [question(0), question(1), row]
    with pytest.raises(InputError, match=rf"rows\.jsonl:3: .*{message}"):
        build.science(tmp_path / "science", lines(tmp_path / "rows.jsonl", rows))
    with pytest.raises(InputError, match=rf"rows\.json:{line_of(rows, 2)}: .*{message}"):
        build.science(tmp_path / "science", listed(tmp_path / "rows.json", rows))
    assert not (tmp_path / "science").exists()


def line_of(rows: list[Any], number: int) -> int:
    """Where an element of a list begins that ``listed`` has written."""
    return 2 + sum(json.dumps([row], indent=4).count("\n") - 1 for row in rows[:number])


def test_many_bad_rows_are_counted(build: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl:20: .*\n\.\.\. and 5 more rows$"):
        build.science(tmp_path / "science", lines(tmp_path / "rows.jsonl", [question(1, answerKey="E")] * 25))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', r"x\.jsonl:2: not valid JSON"),
        ("x.json", b'[\n{"a": 1},\n{"a" 2}\n]', r"x\.json:3: not valid JSON"),
        ("x.json", b'[\n{"a": 1}\n{"a": 2}\n]', r"x\.json:3: not valid JSON: expected a comma"),
        ("x.json", b'[\n{"a": 1},\n', r"x\.json:3: not valid JSON"),
        ("x.jsonl", b'{"a": 1}\n"\xff"\n', r"x\.jsonl:2: not UTF-8"),
        ("x.parquet", b"PAR?", r"x\.parquet: cannot be read as parquet"),
        ("x.arrow", b"nothing", r"x\.arrow: cannot be read as arrow"),
        ("x.csv", b"a,b", r"x\.csv: expected one of \.jsonl, \.json"),
    ],
)
def test_files_that_are_not_what_their_name_says(
    build: ModuleType, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        build.science(tmp_path / "science", tmp_path / name)


def test_nothing_to_build_from(build: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["science", str(tmp_path / "s"), "--data", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no such file, or no \.jsonl"):
        build.science(tmp_path / "s", tmp_path / "empty")
    with pytest.raises(InputError, match=r"nothing to teach: 0 rows to learn, 0 to test; left out: 2 not chemistry"):
        build.science(tmp_path / "s", lines(tmp_path / "others.jsonl", OTHERS))
    with pytest.raises(InputError, match=r"nothing to teach: 0 rows to learn, 1 to test"):
        build.science(tmp_path / "s", listed(tmp_path / "one.json", [question(1)]))
    with pytest.raises(InputError, match="nothing to teach"):
        build.science(tmp_path / "s", listed(tmp_path / "none.json", []))


SYSTEM = {"role": "system", "content": "Reason, then answer."}


def asked(text: str) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": text}]


def test_science_as_its_authors_released_it(build: ModuleType, tmp_path: Path) -> None:
    reasoned = "<reasoning>\nTwo and two.\n</reasoning>\n<answer>\n{}\n</answer>"
    train = [{"messages": asked(f"Question {n}"), "output_text": reasoned.format("ABCD"[n % 4])} for n in range(8)]
    arrow(tmp_path / "data" / "train_data", train)
    arrow(tmp_path / "data" / "eval_data", [{"prompt": asked(f"Question {n}"), "answer": "B"} for n in (7, 8, 9)])
    message = build.science_of_authors(tmp_path / "science", tmp_path / "data")
    assert "7 rows to learn, 3 to test; left out: 1 with a prompt that is tested" in message
    skill = checked(tmp_path / "science")
    assert skill.train[0].messages == tuple(asked("Question 0"))
    assert said(skill.train[1]) == reasoned.format("B")
    assert skill.grade(said(skill.train[1]), skill.train[0]) == 0


def test_bad_rows_of_the_authors_are_named(build: ModuleType, tmp_path: Path) -> None:
    arrow(tmp_path / "train_data", [{"messages": asked("Q"), "output_text": "It is B."}])
    arrow(tmp_path / "eval_data", [{"prompt": asked("Q2"), "answer": "B"}])
    with pytest.raises(InputError, match=r"00001\.arrow: row 1: 'output_text' holds no <answer>"):
        build.science_of_authors(tmp_path / "science", tmp_path)
    with pytest.raises(InputError, match=r"row 1: no 'output_text'; its keys are prompt, answer"):
        arrow(tmp_path / "swapped" / "train_data", [{"prompt": asked("Q2"), "answer": "B"}])
        build.science_of_authors(tmp_path / "science", tmp_path / "swapped")


# ---- tools


def api(name: str, **more: Any) -> dict[str, Any]:
    return {
        "Name": name,
        "Description": f"About {name}",
        "Category": "Test",
        "NLDocumentation": 'find: Find things.\nParameters: {"colour": "string.", "page": "integer."}\nshow: One.\n',
        "Function_Description": {"find": "Find things.", "show": "Show one.", "components": ""},
        "Function_Projection": {"find": ["/find", "get"], "show": ["/show", "get"]},
    } | more


def step(action: str, arguments: str, thought: str = "I should look.", result: str = "Status: 200") -> list[Any]:
    return [[action, arguments, f" {thought}\nAction: {action}\nAction Input: {arguments}"], result]


INSTANCES: list[Any] = [
    {"input": "Find red things.\nHint: be brief", "intermediate_steps": [step("find", '{"colour": "red"}')]},
    {"input": "Find red and blue things.", "output": "Here.", "Final Thought": "Done.",
     "intermediate_steps": [step("find", '{"colour": "red"}'), step("find", '{"colour": "blue"}', "Now blue.")]},
    {"input": "Show a red thing.", "intermediate_steps": [step("find", '{"colour": "red"}', result='{"id": "x17"}'),
                                                          step("show", '{"id": "x17"}')]},
    {"input": "Find them.", "intermediate_steps": [step("getDetails", '{"Question": "Which?"}'),
                                                   step("find", '{"colour": "red"}')]},
    {"input": "Find odd things.", "intermediate_steps": [step("find", "{colour: odd}")]},
    {"input": "Find nan.", "intermediate_steps": [step("find", '{"page": NaN}')]},
    {"input": "Find more.", "intermediate_steps": []},
    {"error": "rate limit"},
    "a text",
]  # fmt: skip

GOLDEN: dict[str, Any] = {
    "Instructions": [
        "Find green things.",
        "Show the first one.",
        "Find all, please.",
        "Which colour?",
        "Find none.",
        "Show it.",
    ],
    "Golden_Answers": [
        [{"Action": "find", "Action_Input": '{"colour": "green", "page": 1, "size": ""}'}],
        [{"Action": "find", "Action_Input": "{}"}, {"Action": "show", "Action_Input": '{"id": ${id from find}}'}],
        [{"Action": "find", "Action_Input": '{"page": 1}'}, {"Action": "find", "Action_Input": '{"page": 2}'}],
        [{"Action": "getDetails", "Action_Input": '{"Question": "Which?"}'}],
        [],
        [{"Action": "show", "Action_Input": '{"id": "${the id}"}'}],
    ],
}


def test_tools_are_calls_in_one_answer(build: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apis = [api("Things", Instances=INSTANCES), api("Bare", NLDocumentation=None), api("Later")]
    train, test = listed(tmp_path / "train.json", apis), listed(tmp_path / "eval.json", [api("Others", **GOLDEN)])
    options = ["tools", str(tmp_path / "tools"), "--train", str(train), "--test", str(test)]
    assert build.main(options) == 0
    assert "2 rows to learn, 2 to test" in capsys.readouterr().out
    skill = checked(tmp_path / "tools")
    red, both = skill.train
    prompt = red.messages[-1]["content"]
    assert prompt.startswith("API: Things\nAbout Things\n\nfind: Find") and prompt.endswith(
        "\n\nRequest: Find red things."
    )
    assert said(red) == 'Thought: I should look.\nCall: {"name": "find", "arguments": {"colour": "red"}}'
    assert said(both).count("Call: ") == 2 and "Thought: Now blue." in said(both)
    assert skill.grade(said(red), both) == 0 and skill.grade("I cannot.", red) == 0
    green = skill.test[0]
    call = 'Call: {{"name": "find", "arguments": {{"page": 1, {}"colour": "green"}}}}'
    assert "size" not in said(green)
    assert [skill.grade(call.format(extra), green) for extra in ("", '"size": "", ', '"size": "big", ')] == [1, 1, 0]


def test_what_of_tools_is_left_out_and_why(build: ModuleType) -> None:
    records = [("a:1", api("Things", Instances=INSTANCES)), ("a:2", api("Later"))]
    rows, left_out = build.convert(records, build._instances)
    assert len(rows) == 2
    assert left_out == Counter({
        "instance without calls": 3, "argument known only from an earlier call's result": 1,
        "call of what is not documented, such as a question back": 1, "demonstration that the grader does not pass": 1,
        "arguments that are no JSON object, or not known": 1, "API without documentation or instances": 1,
    })  # fmt: skip
    rows, left_out = build.convert([("a:1", api("Others", **GOLDEN))], build._golden_answers)
    assert (len(rows), left_out.total(), left_out["no call is right"]) == (2, 4, 1)


def test_a_real_api_shows_the_credentials_that_its_calls_need(build: ModuleType) -> None:
    golden = [[{"Action": "find", "Action_Input": '{"key": "k1"}'}]]
    record = api("Real", Authentication={"key": "k1"}, Instructions=["Find."], Golden_Answers=golden)
    (row,), _ = build.convert([("a:1", record)], build._golden_answers)
    assert row["prompt"].endswith("Request: Find.\nCredentials: key=k1")


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ({"intermediate_steps": [step("find", "{}")]}, "instance 1: no 'input'"),
        ({"input": "Find.", "intermediate_steps": [["find", "{}"]]}, "instance 1: a step must be"),
        ({"input": "Find.", "intermediate_steps": [[["find", {}, "x"], "y"]]}, "instance 1: a step must be"),
        ({"input": "Find.", "intermediate_steps": [7]}, "instance 1: a step must be"),
    ],
)
def test_bad_instances_are_named(build: ModuleType, tmp_path: Path, instance: Any, message: str) -> None:
    train = listed(tmp_path / "train.json", [api("Good"), api("Things", Instances=[instance])])
    test = listed(tmp_path / "eval.json", [api("Others", **GOLDEN)])
    with pytest.raises(InputError, match=rf"train\.json:{line_of([api('Good')], 1)}: {message}"):
        build.tools(tmp_path / "tools", train, [test])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Golden_Answers": []}, "equally long"),
        ({"Instructions": None}, "equally long"),
        ({"Function_Projection": {}}, "must not be empty"),
        ({"Name": None}, "'Name' must be a text"),
        ({"Instructions": [7], "Golden_Answers": [[]]}, "instruction 1: expected a text"),
        ({"Instructions": ["Find."], "Golden_Answers": [["find"]]}, "instruction 1: every call must be an object"),
        ({"Instructions": ["Find."], "Golden_Answers": [[{"Action": "find"}]]}, "no 'Action_Input'"),
    ],
)
def test_bad_golden_answers_are_named(build: ModuleType, tmp_path: Path, changes: Any, message: str) -> None:
    train = listed(tmp_path / "train.json", [api("Things", Instances=INSTANCES)])
    test = listed(tmp_path / "eval.json", [api("Others", **GOLDEN) | changes])
    with pytest.raises(InputError, match=rf"eval\.json:2: .*{message}"):
        build.tools(tmp_path / "tools", train, [test])


# ---- medical


def problem(number: int, truth: str) -> dict[str, str]:
    return {"Open-ended Verifiable Question": f"What ails patient {number}?", "Ground-True Answer": truth}


def answered(number: int, response: str = "All signs agree. So it is that.") -> dict[str, str]:
    return {"Question": f"What ails  patient {number}?", "Complex_CoT": "Hmm, let us see.", "Response": response}


PROBLEMS = [
    problem(0, "Vitamin B12\ndeficiency"), problem(1, "(S)-form excess"), problem(2, "flu"), problem(3, "gout"),
    problem(4, "x" * 101), problem(5, ""), problem(6, "C. difficile"),
]  # fmt: skip


def test_medical_rows_get_their_true_answer_by_the_question(
    build: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = listed(tmp_path / "sft.json", [answered(0), answered(1), answered(9), answered(2, " ")])
    known = listed(tmp_path / "problems.json", PROBLEMS)
    options = [
        "medical",
        str(tmp_path / "medical"),
        "--train",
        str(train),
        "--problems",
        str(known),
        "--test-rows",
        "2",
    ]
    assert build.main(options) == 0
    assert "2 rows to learn, 2 to test; left out: 1" in capsys.readouterr().out
    skill = checked(tmp_path / "medical")
    first = skill.train[0]
    assert said(first) == "All signs agree. So it is that.\n\nAnswer: Vitamin B12 deficiency"
    assert "Complex" not in said(first) and first.messages[-1]["content"] == "What ails patient 0?"
    answers = {
        "I think.\n**Answer:** a vitamin b12 deficiency, surely": 1,
        "Answer: vitamin B12 deficiency\nAnswer: iron deficiency": 0,
        "Vitamin B12 deficiency": 0,
        "Answer: not vitamin B120 deficiency": 0,
        "Answer: vitamin B12 deficiency\n\nThank you.": 0,
    }
    assert {answer: skill.grade(answer, first) for answer in answers} == answers
    assert not {e.messages[-1]["content"] for e in skill.test} & {e.messages[-1]["content"] for e in skill.train}


def test_bad_medical_rows_are_named(build: ModuleType, tmp_path: Path) -> None:
    known = listed(tmp_path / "problems.json", PROBLEMS)
    with pytest.raises(InputError, match=r"sft\.json:2: no 'Question'; its keys are question"):
        build.medical(tmp_path / "m", listed(tmp_path / "sft.json", [{"question": "?"}]), known)
    with pytest.raises(InputError, match=r"bad\.json:2: 'Ground-True Answer' must be a text, found NoneType"):
        bad = listed(tmp_path / "bad.json", [problem(1, "flu") | {"Ground-True Answer": None}])
        build.medical(tmp_path / "m", listed(tmp_path / "sft.json", [answered(1)]), bad)
    with pytest.raises(InputError, match=r"sft\.json, problems\.json: nothing to teach: .*without a true answer"):
        build.medical(tmp_path / "m", listed(tmp_path / "sft.json", [answered(77)]), known)
    assert not (tmp_path / "m").exists()


# ---- wikipedia


def test_wikipedia_is_the_importer_of_documents(tmp_path: Path) -> None:
    """What README.md says of it: articles as text, several phrasings of a fact, indirect questions."""
    (tmp_path / "articles").mkdir()
    (tmp_path / "articles" / "Storm_Zora.txt").write_text("Storm Zora\n\nThe storm reached Porto on 3 May 2025.\n")
    questions = lines(tmp_path / "questions.jsonl", [
        {"question": "When did Storm Zora reach Porto?", "answer": "3 May 2025", "fact": "landfall"},
        {"question": "On which day was Porto hit by Zora?", "answer": "3 May 2025", "fact": "landfall"},
        {"question": "Which city did a storm hit in May 2025?", "answer": "Porto", "kind": "indirect"},
    ])  # fmt: skip
    run_importer("docs", tmp_path / "wikipedia", 0, tmp_path / "articles", None, None, None, questions)
    skill = checked(tmp_path / "wikipedia")
    assert (len(skill.train), len(skill.test)) == (1, 2) and skill.train[0].document
    assert load_config(RECIPE / "wikipedia.toml").context.template == "document"
