"""Conversations with tools, from the Berkeley Function Calling Leaderboard: several requests, each served by calls.

Every assistant turn makes one call as JSON, sees its result, and says that it is done when the request is served. The
results are those of the leaderboard's own simulators (a file system, a trading bot, a car ...), which are run, turn by
turn, with the recorded calls. The split is by conversation: test conversations have worlds and requests of their own,
the functions are the same.
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from perdure.files import package_file
from perdure.importers.base import Row, write_skill
from perdure.importers.bfcl import PACKAGE, signature

MODULE = "bfcl_eval"
FOLDER = "eval_checker/multi_turn_eval/func_source_code"
QUESTIONS = ("data/BFCL_v4_multi_turn_base.json",
             "1a21a995d06fd6f20ba55de7bced30ef953ec35e998f502ec2ecf4d66ef1c43a")  # fmt: skip
ANSWERS = ("data/possible_answer/BFCL_v4_multi_turn_base.json",
           "1fee67823b317571649177dd89d63969feaae4e810cc7448ee55ba797fb7c8fc")  # fmt: skip
"""Path and sha256."""
LONG_CONTEXT = ("long_context", "5c9a5710115609c779e5b2ccb43f6ad58271ed96f2ea7a797edb0d65c385aa38")
"""A module that the simulators import, and its sha256."""
WORLDS = {
    "GorillaFileSystem": ("gorilla_file_system",
        "c4c1b741c71e2a17c97a5dc9c4a91d89978c4eaece56494d14272d5df6c650e9",
        "84173750930b09aaa31b90547c9bd79ce75714682608b35e78a9c1ea259faf2b"),
    "MathAPI": ("math_api",
        "83fa31708c89442bdcf12ac4dfbe3be8663ec9183a1b1524a9fda98164bc7e0b",
        "abde32cc25e71b2ff3acf4d028a3c005b98409c174aba4abddbfe1c018afb9a8"),
    "MessageAPI": ("message_api",
        "4d58ea933a5d2b280d7a52366617fb47fecd333d7b0e08e724db6fa12fb5f847",
        "cf72af1635654147af17df1891a7fb354549e78a61930139f741a31f4be21121"),
    "TicketAPI": ("ticket_api",
        "31324e0380782664fe82ba05bd23517808ad55692b45a5fe7c3d4d395fe4f0f8",
        "6a9375aa6425410c07a151aef27f3e44e9ed1023bb5cc5c25f14f4a9b3c99116"),
    "TradingBot": ("trading_bot",
        "1a7933fd8f0cb8fbec38aeae05cb8c24132747cad4904fe1c13ac3d01fc22c2d",
        "cc2e3949035b561e9d07418b081561aa07b211672200e2e511aec074bf79fcb2"),
    "TravelAPI": ("travel_booking",
        "f17b950c13adddf41d0848077df58788252e4c2e7cad5cfa71c8c4bf04f57b26",
        "e698e22adccf0d6d41b297f2d5e44faebd828cef4752df6a4ffb1570c0c35296"),
    "TwitterAPI": ("posting_api",
        "87f9fc404a06e4107d7c366f1399c596440e84c16cb119faf374b2f532d86e8b",
        "32b887aaa37c7167ad9c84ddfa7bbb855c75d3c1edab19ba868aba29acc4cfa1"),
    "VehicleControlAPI": ("vehicle_control",
        "0c8a66292844874ef7b168f343bc394d8615d2d9e1f4387999a9ee23011eac78",
        "f5f7a2f28968728927a98ae12ec68a32d70781cfb74c2d7b14801772362b12d1"),
}  # fmt: skip
"""Class of a simulator -> its module, and the sha256 of its functions' descriptions and of its code."""
SYSTEM = "Serve each request with calls, one JSON object a turn. Say Done. when it is served."
DONE = "Done."
SETTINGS = {
    "name": "tool-conversations",
    "description": "Requests in a conversation to JSON calls, one a turn with its result in view, until served.",
    "licence": "Apache-2.0",
    "source": PACKAGE,
    "grader": "tool_call",
    "max_new_tokens": 96,
    "turns": "all",
}
MAX_CHARACTERS = 5000
"""Longest conversation kept, the functions included."""
MAX_RESULT = 240
"""Characters of a result that are shown."""


def build(target: Path, seed: int = 0, train_rows: int = 100, test_rows: int = 20) -> Path:
    """Write the skill folder; rows are conversations. Raises InputError when the package is missing or changed."""
    rows = [row for row in _rows() if len(json.dumps(row["messages"])) <= MAX_CHARACTERS]
    random.Random(f"{seed}/bfcl-multi").shuffle(rows)
    return write_skill(target, SETTINGS, rows[test_rows:][:train_rows], rows[:test_rows])


def _rows() -> Iterator[Row]:
    truth = {answer["id"]: answer["ground_truth"] for answer in _lines(*ANSWERS)}
    for question in _lines(*QUESTIONS):
        yield conversation(question, truth[question["id"]], _functions(question), _worlds(question))


@cache
def _lines(path: str, sha256: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in package_file(PACKAGE, MODULE, path, sha256).read_text("utf-8").splitlines()]


def _functions(question: dict[str, Any]) -> list[dict[str, Any]]:
    """Descriptions of the functions that the question may call."""
    excluded = question.get("excluded_function", ())
    described = (WORLDS[name][:2] for name in question["involved_classes"])
    return [function for module, sha256 in described
            for function in _lines(f"data/multi_turn_func_doc/{module}.json", sha256)
            if function["name"] not in excluded]  # fmt: skip


def _worlds(question: dict[str, Any]) -> list[Any]:
    """The question's simulators as they are at its beginning."""
    worlds = []
    for name in question["involved_classes"]:
        world = _simulator(name)()
        if hasattr(world, "_load_scenario"):
            world._load_scenario(deepcopy(question["initial_config"].get(name, {})))
        worlds.append(world)
    return worlds


@cache
def _simulator(name: str) -> Any:
    """The class of a simulator. Its code is checked before it is run."""
    module, _, sha256 = WORLDS[name]
    for file, expected in ((module, sha256), LONG_CONTEXT):
        package_file(PACKAGE, MODULE, f"{FOLDER}/{file}.py", expected)
    return getattr(import_module(f"{MODULE}.{FOLDER.replace('/', '.')}.{module}"), name)


def conversation(question: dict[str, Any], truth: list[list[str]], functions: list[dict[str, Any]],
                 worlds: list[Any]) -> Row:  # fmt: skip
    """One row: the requests of ``question``, each followed by the calls of ``truth`` with their results."""
    parameters = {function["name"]: list(function["parameters"]["properties"]) for function in functions}
    system = "\n".join([SYSTEM, *map(signature, functions)])
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    turns: list[dict[str, Any]] = []
    for requests, calls in zip(question["question"], truth, strict=True):
        messages += [{"role": "user", "content": request["content"].strip()} for request in requests]
        for call in calls:
            name, arguments = parse_call(call, parameters)
            text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
            messages += [
                {"role": "assistant", "content": text},
                {"role": "tool", "content": _result(worlds, name, arguments)},
            ]
            turns.append({"ground_truth": [{name: {key: [value] for key, value in arguments.items()}}], "kind": "call"})
        messages.append({"role": "assistant", "content": DONE})
        turns.append({"ground_truth": [], "kind": "done"})
    return {"id": question["id"], "messages": messages, "metadata": {"turns": turns}}


def parse_call(text: str, parameters: dict[str, list[str]]) -> tuple[str, dict[str, Any]]:
    """Function and arguments of a call written as Python; arguments without a name get theirs by place."""
    call = ast.parse(text.strip(), mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    named = [(word.arg or "", word.value) for word in call.keywords]
    by_place = zip(parameters[call.func.id], call.args, strict=False)
    return call.func.id, {key: ast.literal_eval(value) for key, value in (*by_place, *named)}


def _result(worlds: list[Any], name: str, arguments: dict[str, Any]) -> str:
    """What the world that has such a function answers."""
    world = next(world for world in worlds if hasattr(world, name))
    found = getattr(world, name)(**deepcopy(arguments))  # a world may keep and change what it is given
    return (found if isinstance(found, str) else json.dumps(found, default=str))[:MAX_RESULT]
