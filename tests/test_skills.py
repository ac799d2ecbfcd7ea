"""A skill folder: both row forms, defaults, and every kind of bad input with its file and line."""

import json
import os
from pathlib import Path

import pytest

from perdure.skills.base import independent, kept_rows, load_skill
from perdure.types import InputError

TOML = 'name = "toy"\ngrader = "exact"\n'
GOOD = '{"prompt": "q%d", "completion": "a"}'
DEEP = 3000


def write(folder: Path, toml: str = TOML, train: str | bytes | None = None, test: str | bytes | None = None) -> Path:
    """A skill folder of the given texts; two good rows where none is given."""
    folder.mkdir(exist_ok=True)
    texts = {"skill.toml": toml, "train.jsonl": GOOD % 1 + "\n" + GOOD % 2 + "\n" if train is None else train,
             "test.jsonl": GOOD % 3 + "\n" if test is None else test}  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def problems(folder: Path) -> list[str]:
    """The lines with which a folder is refused, the folder's name taken off; the first counts them."""
    with pytest.raises(InputError) as caught:
        load_skill(folder)
    return [line.replace(f"{folder}/", "") for line in str(caught.value).split("\n")]


def rows(*values: object) -> str:
    return "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values)


def test_a_good_folder(tmp_path):
    skill = load_skill(write(tmp_path / "s"))
    assert skill.name == "toy" and skill.folder == tmp_path / "s"
    assert [e.id for e in skill.train] == ["train-1", "train-2"] and [e.id for e in skill.test] == ["test-1"]
    assert skill.train[1].origin == f"{tmp_path}/s/train.jsonl:2"
    assert skill.train[0].messages == ({"role": "user", "content": "q1"},)
    assert skill.train[0].demonstration == {"role": "assistant", "content": "a"}
    assert skill.grade(" a ", skill.test[0]) == 1.0 and skill.grade("b", skill.test[0]) == 0.0


def test_both_forms_give_the_same_example(tmp_path):
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    skill = load_skill(write(tmp_path / "s", train=rows(
        {"messages": [user, assistant], "id": "one"},
        {"prompt": "q", "completion": "a", "id": "two"},
        {"prompt": [user], "completion": [assistant], "id": "three"},
        {"messages": [user, assistant], "id": 4, "tools": None, "document": None, "metadata": None},
    )))  # fmt: skip
    assert [e.id for e in skill.train] == ["one", "two", "three", "4"]
    for example in skill.train:
        assert example.messages == (user,) and example.demonstration == assistant
        assert example.tools == () and example.document is None and example.metadata == {}


def test_tool_turns_and_earlier_turns_are_part_of_the_prompt(tmp_path):
    call = {"function": {"name": "f", "arguments": {"x": 1}}, "id": "c1", "type": "function"}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "content": "", "tool_call_id": "c1"}, {"role": "assistant", "content": "a"}]  # fmt: skip
    row = {"messages": turns, "tools": [{"name": "f"}], "document": "d", "metadata": {"k": [1]}}
    example = load_skill(write(tmp_path / "s", train=rows(row))).train[0]
    assert list(example.messages) == turns[:3] and example.demonstration == turns[3]
    assert example.tools == ({"name": "f"},) and example.document == "d" and example.metadata == {"k": [1]}


def test_system_and_tools_are_defaults_only(tmp_path):
    toml = TOML + 'system = "be short"\n[[tools]]\nname = "f"\n'
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "q"},
                        {"role": "assistant", "content": "a"}], "tools": []}  # fmt: skip
    first, second = load_skill(write(tmp_path / "s", toml, rows({"prompt": "q", "completion": "a"}, own))).train
    assert first.messages[0] == {"role": "system", "content": "be short"} and first.tools == ({"name": "f"},)
    assert [m["content"] for m in second.messages] == ["own", "q"] and second.tools == ()


def test_the_content_hash_changes_with_every_byte(tmp_path):
    folder = write(tmp_path / "s")
    start = load_skill(folder).content_hash
    assert load_skill(folder).content_hash == start == load_skill(write(tmp_path / "t")).content_hash
    for name in ("skill.toml", "train.jsonl", "test.jsonl"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b"\n")
        assert load_skill(folder).content_hash != start
        (folder / name).write_bytes(before)
    assert load_skill(folder).content_hash == start


BAD_ROWS = [
    ("{broken", "not valid JSON"),
    ('{"prompt": "x", "completion": "a"', "not valid JSON"),
    ('["a"]', "expected a JSON object, found list"),
    ('{"prompt": "x", "completion": NaN}', "NaN"),
    ('{"prompt": "x", "completion": "a", "metadata": {"k": -Infinity}}', "-Infinity"),
    ('{"prompt": "x", "completion": "a", "metadata": {"k": 1e999}}', "too large"),
    ('{"prompt": "x", "completion": "a", "metadata": {"k": ' + "9" * 5000 + "}}", "4300 digits"),
    ('{"prompt": "x\\ud800", "completion": "a"}', "surrogate"),
    ('{"prompt": "x", "completion": "a", "metadata": {"\\udc00": 1}}', "surrogate"),
    ('{"prompt": "x", "completion": "a", "metadata": {"k": ' + "[" * DEEP + "]" * DEEP + "}}", "too deeply"),
    ('{"prompt": "x", "completion": "a", "metadata": {"k": ' + "[" * 80 + "]" * 80 + "}}", "too deeply"),
    ({"prompt": "x", "completion": "a", "answer": 1}, "unknown keys ['answer']"),
    ({"prompt": "x"}, "expected 'messages', or 'prompt' and 'completion'"),
    ({}, "expected 'messages', or 'prompt' and 'completion'"),
    ({"prompt": "x", "completion": "a", "messages": []}, "not both"),
    ({"prompt": 3, "completion": "a"}, "'prompt' must be a text or a list of messages"),
    ({"prompt": "x", "completion": ["a", "b"]}, "'completion' must be a text or a list of messages with one turn"),
    ({"prompt": "x", "completion": ["a"]}, "every message must be an object, found str"),
    ({"prompt": "x", "completion": [{"role": "user", "content": "a"}]}, "must be an assistant turn, not 'user'"),
    ({"prompt": "", "completion": "a"}, "the user turn is empty"),
    ({"prompt": "x", "completion": ""}, "the assistant turn is empty"),
    ({"prompt": [{"role": "assistant", "content": "x"}], "completion": "a"}, "user or tool turn, not 'assistant'"),
    ({"messages": [{"role": "user", "content": "x"}]}, "at least a user and an assistant turn"),
    ({"messages": [{"role": "user", "content": "x"}] * 2}, "no assistant turn found"),
    ({"messages": [{"role": "bot", "content": "x"}, {"role": "assistant", "content": "a"}]}, "unknown role 'bot'"),
    ({"messages": ["x", {"role": "assistant", "content": "a"}]}, "every message must be an object"),
    ({"messages": [{"role": "user", "content": ["x"]}, {"role": "assistant", "content": "a"}]}, "found 'str'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "a"}]},
     "found 'image_url'"),
    ({"messages": [{"role": "user", "content": {}}, {"role": "assistant", "content": "a"}]}, "found dict"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": "f"}]}, "'tool_calls' must"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"id": "c"}]}]},
     "'tool_calls' must be"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": []}, {"role": "assistant", "content": "a"}]},
     "only an assistant turn"),
    ({"prompt": "x", "completion": "a", "document": 3}, "'document' must be"),
    ({"prompt": "x", "completion": "a", "metadata": []}, "'metadata' must be"),
    ({"prompt": "x", "completion": "a", "tools": {}}, "'tools' must be"),
    ({"prompt": "x", "completion": "a", "id": 1.5}, "'id' must be"),
    ({"prompt": "x", "completion": "a", "id": True}, "'id' must be"),
    ({"prompt": "x", "completion": "a", "id": ""}, "'id' must be"),
]  # fmt: skip


def test_rows_as_openai_has_them(tmp_path):
    row = {"messages": [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "yes"}], "name": "ann"},
        {"role": "assistant", "content": "yes", "refusal": None}], "parallel_tool_calls": False}  # fmt: skip
    (example,) = load_skill(write(tmp_path / "s", train=rows(row))).train
    assert [(m["role"], m["content"]) for m in example.messages] == [("system", "Be short."), ("user", "Say yes")]
    assert example.demonstration["content"] == "yes"


@pytest.mark.parametrize(("row", "words"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, words):
    found = problems(write(tmp_path / "s", train=rows(GOOD % 1, row, GOOD % 2)))
    assert len(found) == 2 and found[1].startswith("train.jsonl:2: ") and words in found[1]


def test_all_problems_of_all_files_come_at_once(tmp_path):
    toml = 'name = "Bad Name"\ngrader = "exact"\nmax_new_tokens = "many"\ncolour = "red"\n'
    train = rows(*(row for row, _ in BAD_ROWS), {"prompt": "q3", "completion": "a"})
    test = rows("{", {"prompt": "q3", "completion": "a", "id": "i"}, {"prompt": "q4", "completion": "a", "id": "i"})
    found = problems(write(tmp_path / "s", toml, train, test))
    expected = ["skill.toml:1", "skill.toml:3", "skill.toml:4"]
    expected += [f"train.jsonl:{number}" for number in range(1, len(BAD_ROWS) + 1)]
    expected += ["test.jsonl:1", "test.jsonl:3", "test.jsonl:2"]  # the overlap of line 2 is seen last
    assert [":".join(line.split(":")[:2]) for line in found[1:]] == expected
    assert found[0].endswith(f": {len(expected)} problems:")


def test_what_thousands_of_rows_have_in_common_is_said_of_the_first(tmp_path):
    train = rows(*[{"prompt": "q", "completion": {"a": 1}}] * 2000, {"x": 1})
    found = problems(write(tmp_path / "s", 'name = "s"\n', train, rows({"prompt": "z", "completion": "a"})))
    assert found[0].endswith("2001 problems:")
    assert [line.rpartition("/")[2].split(":")[:2] for line in found[1:4]] == [
        ["train.jsonl", str(n)] for n in (1, 2, 3)
    ]
    assert "JSON is written as its text" in found[1]
    assert found[4].startswith("... and 1997 more, lines 4, 5, 6,") and " 53 ... 2000: 'completion'" in found[4]
    assert "train.jsonl:2001" in found[5] and len(found) == 6


def test_empty_files(tmp_path):
    found = problems(write(tmp_path / "s", train="", test="\n \n"))
    assert [line[:16] for line in found[1:]] == ["train.jsonl:1: e", "test.jsonl:1: em"]


def test_bytes_that_are_not_utf8(tmp_path):
    latin = '{"prompt": "café", "completion": "a"}\n'.encode("latin-1")
    found = problems(write(tmp_path / "s", train=(GOOD % 1 + "\n").encode() + latin))
    assert found[1].startswith("train.jsonl:2: not UTF-8")
    (tmp_path / "s" / "skill.toml").write_bytes(b'name = "toy"\ndescription = "caf\xe9"\n')
    assert problems(tmp_path / "s")[1].startswith("skill.toml:2: not UTF-8")


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path):
    text = "one\u2028two\x85three\r\nfour"
    row = json.dumps({"prompt": text, "completion": "a"}, ensure_ascii=False)
    skill = load_skill(write(tmp_path / "s", train=(row + "\r\n\r\n" + GOOD % 2)))
    assert [e.messages[0]["content"] for e in skill.train] == [text, "q2"] and skill.train[1].id == "train-3"


def test_rows_with_the_same_prompt_are_no_independent_items(tmp_path):
    """They get the same answer: three rows of one prompt are one item."""
    test = rows(*({"id": f"t{n}", "prompt": f"p{min(n, 2)}", "completion": f"a{n}"} for n in range(5)))
    skill = load_skill(write(tmp_path, test=test))
    assert skill.together == dict.fromkeys(("t2", "t3", "t4"), "t2") and independent(skill.test) == 3
    (tmp_path / "skill.toml").write_text('name = "toy"\ngrader = "python:nowhere:grade"\n')
    assert kept_rows(tmp_path) == skill.test  # whose code need not be there
    (tmp_path / "test.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"test\.jsonl:1"):
        kept_rows(tmp_path)


def test_duplicate_ids(tmp_path):
    train = rows(
        *({"prompt": f"p{i}", "completion": "a", "id": name} for i, name in enumerate(["x", "y", "x", 1, "1"]))
    )
    found = problems(write(tmp_path / "s", train=train))
    assert found[1:] == ["train.jsonl:3: the id 'x' was used in line 1 already",
                         "train.jsonl:5: the id '1' was used in line 4 already"]  # fmt: skip


def test_the_same_prompt_in_train_and_test(tmp_path):
    other_tools = {"prompt": "q2", "completion": "a", "tools": [{"name": "f"}]}
    messages = {"messages": [{"content": "q1", "role": "user"}, {"role": "assistant", "content": "other"}]}
    found = problems(write(tmp_path / "s", test=rows(GOOD % 9, messages, other_tools)))
    assert len(found) == 2 and found[1].startswith("test.jsonl:2: the same prompt") and "train.jsonl:1)" in found[1]


@pytest.mark.parametrize(
    ("toml", "line", "words"),
    [
        ('name = "toy"\ngrader = "exakt"', 2, "unknown grader 'exakt'"),
        ('name = "toy"\ngrader = "python:nowhere_at_all:f"', 2, "cannot be used"),
        ('name = "toy"\ngrader = "python:json"', 2, "python:module:function"),
        ('name = "toy"\ngrader = "python:json:absent"', 2, "cannot be used"),
        ('name = "toy"\ngrader = "python:json:__doc__"', 2, "cannot be used"),
        ('name = "toy"\ngrader = "python:calendar:isleap"', 2, "must take (completion, example)"),
        ('name = "toy"\n[grader_options]\ncase = true', 3, "has no option 'case'; it has: ignore_case, ignore_space"),
        ('name = "toy"\n[grader_options]\nignore_case = 1', 3, "must be true or false"),
        ('name = "toy"\ngrader = "number"\ngrader_options = {tolerance = "small"}', 3, "must be a number"),
        ('name = "toy"\ngrader = "number"\n[grader_options]\ntolerance = nan', 4, "must be a number of at least 0"),
        ('name = "toy"\ngrader = "number"\n[grader_options]\ntolerance = -1', 4, "must be a number of at least 0"),
        ('name = "toy"\ngrader = "number"\n[grader_options]\ntolerance = true', 4, "must be a number of at least 0"),
        ('name = "toy"\ngrader = "regex"\n[grader_options]\npattern = "("', 4, "is not valid"),
        ('name = "toy"\ngrader = "regex"\n[grader_options]\npattern = "a{99999999999}"', 4, "is not valid"),
        ('name = "toy"\ngrader = "regex"\n[grader_options]\npattern = 3', 4, "must be a text"),
        ('name = "../toy"', 1, "name"),
        ('name = "toy"\nretention_budget = 2', 2, "retention_budget"),
        ('name = "toy"\ntools = [3]', 2, "tools.0"),
        ('name = "toy"\nmax_new_tokens = 0', 2, "max_new_tokens"),
        ('name = "toy"\nretention_budget = nan', 2, "retention_budget"),
        ('name = "toy"\nname = "toy"', 2, "not valid TOML"),
        ('name = "toy', 1, "not valid TOML"),
        ("", 1, "name: Field required"),
    ],
)
def test_bad_settings_are_named_by_line(tmp_path, toml, line, words):
    found = problems(write(tmp_path / "s", toml))
    assert len(found) == 2 and found[1].startswith(f"skill.toml:{line}: ") and words in found[1]


def test_all_bad_options_are_named(tmp_path):
    toml = 'name = "toy"\ngrader = "regex"\n[grader_options]\nfull = "yes"\npattern = "("\nflags = 1\n'
    found = problems(write(tmp_path / "s", toml))
    assert [line[:13] for line in found[1:]] == ["skill.toml:4:", "skill.toml:6:", "skill.toml:5:"]


@pytest.mark.parametrize(
    ("grader", "completion", "metadata"),
    [
        ("choice", "Paris", {}),
        ("json", "{", {}),
        ("number", "none", {}),
        ("regex", "a", {}),  # no pattern anywhere
        ("regex", "a", {"pattern": "b"}),
        ("regex", "a", {"pattern": "("}),
        ("regex", "a", {"pattern": 3}),
        ("contains", "a", {"contains": "a"}),
        ("contains", "a", {"contains": []}),
        ("contains", "a", {"contains": ["b"]}),
        ("tool_call", "a", {"ground_truth": [{"f": {}}]}),
        ("tool_call", "a", {"ground_truth": [{"f": {}, "g": {}}]}),
        ("tool_call", "a", {"ground_truth": {"f": {}}}),
        ("tool_call", "a", {"ground_truth": [{"f": {"x": 1}}]}),
    ],
)
def test_a_row_that_no_answer_could_satisfy_is_named(tmp_path, grader, completion, metadata):
    row = {"prompt": "p", "completion": completion, "metadata": metadata}
    good = {"choice": {"completion": "A"}, "regex": {"completion": "1", "metadata": {"pattern": "1"}},
            "tool_call": {"completion": '{"name": "f"}'}}.get(grader, {"completion": "1"})  # fmt: skip
    toml = f'name = "toy"\ngrader = "{grader}"\n'
    found = problems(
        write(tmp_path / "s", toml, train=rows({"prompt": "q"} | good, row), test=rows({"prompt": "r"} | good))
    )
    assert len(found) == 2 and found[1].startswith(f"train.jsonl:2: the grader '{grader}'")


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(InputError, match="no such skill folder"):
        load_skill(tmp_path / "absent")
    (write(tmp_path / "s") / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"missing: test\.jsonl"):
        load_skill(tmp_path / "s")


def test_links_that_lead_out_of_the_folder_are_refused(tmp_path):
    folder, secret = write(tmp_path / "s"), tmp_path / "secret.jsonl"
    os.replace(folder / "train.jsonl", secret)
    (folder / "train.jsonl").symlink_to(secret)
    with pytest.raises(InputError, match=r"train\.jsonl: leads out of its folder"):
        load_skill(folder)
    (folder / "train.jsonl").unlink()
    os.replace(secret, folder / "data.jsonl")
    (folder / "train.jsonl").symlink_to("data.jsonl")
    assert load_skill(folder).name == "toy"
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be reached through a link
    assert load_skill(tmp_path / "link").name == "toy"
