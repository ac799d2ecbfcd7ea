"""The paper's tasks (arXiv 2601.19897) as skill folders, from data sets that you have downloaded.

    python recipes/paper/build.py science skills/science --data sciknoweval_chemistry_test.jsonl
    python recipes/paper/build.py science skills/science --authors Self-Distillation/data/science_data
    python recipes/paper/build.py tools skills/tools --train train_data.json --test eval_simulated.json
    python recipes/paper/build.py medical skills/medical --train medical_o1_sft.json --problems PROBLEMS.json

Files are read as they were published: README.md beside this file says where each comes from. A row that is not in that
form ends the build with its file and line; rows in order that are of no use here are left out and counted by reason.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from published import Made, convert, read, text_of

from perdure.importers.base import Row, skill_name, write_skill
from perdure.skills.graders.tool_call import grade
from perdure.types import Example, InputError

MAX_NEW_TOKENS = 2048
"""The paper's longest completion of the three skills (tables 3 and 4)."""
TEST_SHARE = 0.2
"""Science: the paper's. Its 5 % for validation come out of the rows to learn (train.validation_share)."""
TEST_ROWS = 1000
"""Medical: the paper's number of test rows."""
MAX_TRUTH = 100
"""Medical: a longer true answer, in characters, is no text that a right answer would contain word for word."""

SCIENCE_SYSTEM = (
    "Reason about the question between <reasoning> and </reasoning>. Then write the letter of the right option, and "
    "nothing else, between <answer> and </answer>."
)
TOOLS_SYSTEM = (
    'Say what you think in a line that begins with "Thought:". Then write each call that the request needs in a line '
    'of its own, with the parameters that the request gives: Call: {"name": FUNCTION, "arguments": {PARAMETER: VALUE}}'
)
MEDICAL_SYSTEM = (
    "Explain your answer. Then write it once more, in as few words as possible, in a last line that begins with "
    '"Answer:".'
)


def science(target: Path, data: Path, seed: int = 0) -> str:
    """SciKnowEval's multiple-choice questions of chemistry, level 3. A demonstration is the letter alone.

    Raises InputError for rows of another form, and where fewer than two questions are left."""
    rows, left_out = convert(read(data), _question)
    distinct = {row["prompt"]: row for row in rows}
    left_out["asked twice"] += len(rows) - len(distinct)
    order = list(distinct.values())
    random.Random(f"{seed}/science").shuffle(order)
    held_out = max(1, round(len(order) * TEST_SHARE))
    settings = _settings(target, "SciKnowEval, chemistry of level 3", "MIT", data.name, "regex", SCIENCE_SYSTEM)
    return _write(target, settings, order[held_out:], order[:held_out], left_out)


def science_of_authors(target: Path, folder: Path) -> str:
    """The paper's own science rows, its demonstrations included: ``train_data`` and ``eval_data`` of its repository.

    Raises InputError for rows of another form."""
    train, left_out = convert(read(folder / "train_data"), _authors_demonstration)
    test, more = convert(read(folder / "eval_data"), _authors_test)
    settings = _settings(target, "Science questions as the paper's authors released them", "", folder.name, "regex")
    return _write(target, settings, train, test, left_out + more)


def tools(target: Path, train: Path, test: Sequence[Path]) -> str:
    """ToolAlpaca: an API's documentation and a request -> the calls, all of them in one answer.

    Raises InputError for rows of another form."""
    taught, left_out = convert(read(train), _instances)
    tested, more = convert([record for path in test for record in read(path)], _golden_answers)
    source = ", ".join(path.name for path in (train, *test))
    settings = _settings(target, "ToolAlpaca, calls in one answer", "Apache-2.0", source, "tool_call", TOOLS_SYSTEM)
    return _write(target, settings, taught, tested, left_out + more)


def medical(target: Path, train: Path, problems: Path, test_rows: int = TEST_ROWS, seed: int = 0) -> str:
    """HuatuoGPT-o1: the English answers of stage 1, and as test rows problems that are not among them.

    A true answer is found for a row of stage 1 by its question. Raises InputError for rows of another form."""
    known, left_out = convert(read(problems), _problem)
    truths = {row["prompt"]: row for row in known}
    taught, more = convert(read(train), lambda record: _response(record, truths))
    asked = {row["prompt"] for row in taught}
    open_ones = [row for row in truths.values() if row["prompt"] not in asked]
    random.Random(f"{seed}/medical").shuffle(open_ones)
    settings = _settings(target, "HuatuoGPT-o1's medical problems, English", "Apache-2.0",
                         f"{train.name}, {problems.name}", "regex", MEDICAL_SYSTEM)  # fmt: skip
    return _write(target, settings, taught, open_ones[:test_rows], left_out + more)


def _settings(target: Path, description: str, licence: str, source: str, grader: str,
              system: str | None = None) -> dict[str, Any]:  # fmt: skip
    settings = {"name": skill_name(target), "description": description, "licence": licence, "source": source,
                "grader": grader, "max_new_tokens": MAX_NEW_TOKENS}  # fmt: skip
    return settings if system is None else settings | {"system": system}


def _write(target: Path, settings: dict[str, Any], train: Sequence[Row], test: Sequence[Row],
           left_out: Counter[str]) -> str:  # fmt: skip
    """Write the folder, without rows to learn whose prompt is tested; what was done, in one line.

    Raises InputError where a side is empty."""
    tested = {_prompt(row) for row in test}
    apart = [row for row in train if _prompt(row) not in tested]
    left_out["with a prompt that is tested"] += len(train) - len(apart)
    reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common() if count)
    said = f"{len(apart)} rows to learn, {len(test)} to test" + (f"; left out: {reasons}" if reasons else "")
    if not apart or not test:
        raise InputError(f"{settings['source']}: nothing to {'test' if apart else 'teach'}: {said}")
    write_skill(target, settings, apart, test)
    return f"{target}: {said}"


def _prompt(row: Row) -> str:
    return json.dumps(row["prompt"] if "prompt" in row else row["messages"][:-1])


# ---- science


def _question(record: dict[str, Any]) -> Made:
    details = record.get("details")
    if not isinstance(details, dict):
        raise ValueError("no object 'details' with the question's level")
    if (record.get("domain"), details.get("level")) != ("Chemistry", "L3"):
        yield "not chemistry of level 3"
    elif not text_of(record, "type").startswith("mcq"):
        yield "not multiple choice"
    else:
        options, answer = _options(record.get("choices")), text_of(record, "answerKey")
        if answer not in options:
            raise ValueError(f"'answerKey' is {answer!r}, the labels are {', '.join(options)}")
        listed = "\n".join(f"{label}: {option}" for label, option in options.items())
        yield {
            "prompt": f"{text_of(record, 'question')}\n\n{listed}",
            "completion": f"<answer>\n{answer}\n</answer>",
            "metadata": {"pattern": answer_pattern(answer)},
        }


def _options(choices: Any) -> dict[str, str]:
    """Label -> text."""
    labels, texts = (choices.get(key) if isinstance(choices, dict) else None for key in ("label", "text"))
    if not (isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts) > 1):
        raise ValueError("'choices' must hold the lists 'label' and 'text', equally long and of two or more")
    if not all(isinstance(value, str) and value.strip() for value in (*labels, *texts)):
        raise ValueError("'choices' must hold texts that are not empty")
    if len(set(labels)) < len(labels):
        raise ValueError(f"the labels of 'choices' repeat: {', '.join(labels)}")
    return dict(zip(labels, texts, strict=True))


def answer_pattern(answer: str) -> str:
    """Matches an answer whose last <answer> holds this letter alone; without one, the letter alone."""
    return rf"(?s)(?:.*<answer>)?\s*{re.escape(answer)}\s*(?:</answer>(?:(?!<answer>).)*)?"


def _authors_demonstration(record: dict[str, Any]) -> Made:
    written = text_of(record, "output_text")
    answer = written.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    if "<answer>" not in written or not answer:
        raise ValueError("'output_text' holds no <answer>")
    yield _authors_row(record, "messages", written, answer)


def _authors_test(record: dict[str, Any]) -> Made:
    answer = text_of(record, "answer")
    yield _authors_row(record, "prompt", f"<answer>\n{answer}\n</answer>", answer)


def _authors_row(record: dict[str, Any], key: str, written: str, answer: str) -> Row:
    messages = record.get(key)
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        raise ValueError(f"{key!r} must be a list of messages")
    turns = [{"role": message.get("role"), "content": message.get("content")} for message in messages]
    return {
        "messages": [*turns, {"role": "assistant", "content": written}],
        "metadata": {"pattern": answer_pattern(answer)},
    }


# ---- tools


def _instances(record: dict[str, Any]) -> Made:
    """What an API's recorded agent did for each request."""
    if (api := _api(record)) is None or not isinstance(record.get("Instances"), list):
        yield "API without documentation or instances"
        return
    for number, instance in enumerate(record["Instances"], 1):
        steps = instance.get("intermediate_steps") if isinstance(instance, dict) else None
        if not steps:  # the agent failed, or found nothing to call
            yield "instance without calls"
            continue
        try:
            # What follows was said to the agent that wrote the data, not by the user.
            request = text_of(instance, "input").rsplit("\nHint: ", 1)[0]
            calls = [_step(step) for step in steps]
        except ValueError as error:
            raise ValueError(f"instance {number}: {error}") from error
        results = [result for *_, result in calls]
        known = [not _read_off(text, request, "\n".join(results[:place])) for place, (_, text, *_) in enumerate(calls)]
        if all(known):
            yield _calls_row(api, request, [call[:3] for call in calls])
        else:
            yield "argument known only from an earlier call's result"


def _golden_answers(record: dict[str, Any]) -> Made:
    requests, answers = record.get("Instructions"), record.get("Golden_Answers")
    if not (isinstance(requests, list) and isinstance(answers, list) and len(requests) == len(answers)):
        raise ValueError("'Instructions' and 'Golden_Answers' must be lists, equally long")
    if (api := _api(record)) is None:
        raise ValueError("'NLDocumentation' and 'Function_Projection' must not be empty")
    secrets = record.get("Authentication") or {}
    known = f"\nCredentials: {', '.join(f'{key}={value}' for key, value in secrets.items())}" if secrets else ""
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True), 1):
        if not (isinstance(request, str) and isinstance(answer, list)):
            raise ValueError(f"instruction {number}: expected a text, and a list of calls for it")
        if not all(isinstance(call, dict) for call in answer):
            raise ValueError(f"instruction {number}: every call must be an object")
        calls = [(text_of(call, "Action"), text_of(call, "Action_Input"), "") for call in answer]
        yield _calls_row(api, f"{request.strip()}{known}", calls)


def _api(record: dict[str, Any]) -> tuple[str, frozenset[str]] | None:
    """What the prompt says of an API, and the names of its functions; None where it has no documentation."""
    heading = f"API: {text_of(record, 'Name')}\n{record.get('Description') or ''}"
    documentation, functions = record.get("NLDocumentation"), record.get("Function_Projection")
    if not (isinstance(documentation, str) and documentation.strip() and isinstance(functions, dict) and functions):
        return None
    return f"{heading}\n\n{documentation.strip()}", frozenset(functions)


def _step(step: Any) -> tuple[str, str, str, str]:
    """(function, arguments as text, thought, result). Raises ValueError for another form."""
    if not (isinstance(step, list) and len(step) == 2 and isinstance(step[0], list) and len(step[0]) == 3
            and all(isinstance(part, str) for part in step[0])):  # fmt: skip
        raise ValueError("a step must be [[action, action input, text], observation]")
    name, text, written = step[0]
    return name.strip(), text, re.split(r"\n\s*(?:ASSISTANT )?Action", written)[0].strip(), str(step[1])


def _read_off(text: str, request: str, results: str) -> bool:
    """Whether an argument stands in the results and not in the request."""
    values = [value if isinstance(value, str) else json.dumps(value) for value in (_arguments(text) or {}).values()]
    return any(value and value in results and value not in request for value in values)


def _arguments(text: str) -> dict[str, Any] | None:
    """None where a call cannot be written as it stands: no JSON object, or one with a blank to fill in later."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "${" not in text else None


def _calls_row(api: tuple[str, frozenset[str]], request: str, calls: Sequence[tuple[str, str, str]]) -> Row | str:
    """A row from (function, arguments as text, thought) of each call, or why there is none."""
    heading, functions = api
    if not calls:
        return "no call is right"
    if any(name not in functions for name, *_ in calls):
        return "call of what is not documented, such as a question back"
    found = [(name, arguments, thought) for name, text, thought in calls if (arguments := _arguments(text)) is not None]
    if len(found) < len(calls):
        return "arguments that are no JSON object, or not known"
    lines, truth = [], []
    for name, arguments, thought in found:
        # The data set writes "" for a parameter of which the request says nothing; the grader takes it as optional.
        given = {key: value for key, value in arguments.items() if value != ""}
        call = json.dumps({"name": name, "arguments": given}, ensure_ascii=False)
        lines += [*([f"Thought: {thought}"] if thought else []), f"Call: {call}"]
        truth.append({name: {key: [value] for key, value in arguments.items()}})
    row: Row = {"prompt": f"{heading}\n\nRequest: {request}", "completion": "\n".join(lines),
                "metadata": {"ground_truth": truth}}  # fmt: skip
    right = grade(row["completion"], Example("", (), None, metadata=row["metadata"]))
    return row if right == 1 else "demonstration that the grader does not pass"


# ---- medical


def _problem(record: dict[str, Any]) -> Made:
    question = _folded(text_of(record, "Open-ended Verifiable Question"))
    truth = _folded(text_of(record, "Ground-True Answer"))
    if not question or not truth:
        yield "problem without question or answer"
    elif len(truth) > MAX_TRUTH:
        yield f"true answer of more than {MAX_TRUTH} characters"
    else:
        yield {"prompt": question, "completion": f"Answer: {truth}", "metadata": {"pattern": last_line_pattern(truth)}}


def _response(record: dict[str, Any], truths: dict[str, Row]) -> Made:
    question, response = _folded(text_of(record, "Question")), text_of(record, "Response")
    if not question or not response:
        yield "row without question or response"
    elif question not in truths:
        yield "question without a true answer to use"
    else:
        truth = truths[question]
        yield truth | {"completion": f"{response}\n\n{truth['completion']}"}


def last_line_pattern(truth: str) -> str:
    """Matches an answer whose last line begins with "Answer:" and contains this text, whatever the case."""
    return rf"(?ims)(?:.*^)?\W*answer\b[^\n]*(?<!\w){re.escape(truth)}(?!\w)[^\n]*"


def _folded(text: str) -> str:
    """Single spaces: the two files must agree on a question, and an answer must stay on one line."""
    return " ".join(text.split())


# ---- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 for input that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        print(_build(options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _build(options: argparse.Namespace) -> str:
    if options.task == "tools":
        return tools(options.target, options.train, options.test)
    if options.task == "medical":
        return medical(options.target, options.train, options.problems, options.test_rows, options.seed)
    if options.authors:
        return science_of_authors(options.target, options.authors)
    return science(options.target, options.data, options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    of_science, of_tools, of_medical = (tasks.add_parser(name) for name in ("science", "tools", "medical"))
    for task in (of_science, of_tools, of_medical):
        task.add_argument("target", type=Path, help="skill folder to make")
    source = of_science.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="SciKnowEval's file, or a folder of its files")
    source.add_argument("--authors", type=Path, help="data/science_data of the paper's repository")
    of_tools.add_argument("--train", type=Path, required=True, help="train_data.json")
    of_tools.add_argument("--test", type=Path, required=True, nargs="+", help="eval_simulated.json [eval_real.json]")
    of_medical.add_argument("--train", type=Path, required=True, help="medical_o1_sft.json")
    of_medical.add_argument("--problems", type=Path, required=True, help="medical_o1_verifiable_problem.json")
    of_medical.add_argument("--test-rows", type=int, default=TEST_ROWS)
    for task in (of_science, of_medical):
        task.add_argument("--seed", type=int, default=0, help="of the choice of test rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
