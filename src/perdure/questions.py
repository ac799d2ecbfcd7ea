"""Questions on documents that a model writes, and a pre-test that leaves out what the student knows already.

What a writer sends is not trusted: an answer must stand in its passage and not in the question, and the student itself
must find it with the passage before it and must not know it without. What is dropped is counted by reason. The result
is what a questions file holds (importers/docs.py), for a person to read and mend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perdure.contexts import Renderer
from perdure.evaluate import score_prompts
from perdure.importers.docs import Questions, fact_of, holding, plain, room, wanted
from perdure.importers.passages import Passage, words
from perdure.question_writers import Writer, conversation, parse
from perdure.reporting import Phase, Reporter
from perdure.rollout.base import Progress, RolloutEngine, SamplingParams
from perdure.seeds import derive_seed
from perdure.skills.graders import contains
from perdure.templates import after_reading
from perdure.types import Example, InputError, Prompt

WRITE = SamplingParams(640, temperature=0)
MIN_WORDS = 4
"""Of a question."""
MAX_ANSWER_WORDS = 12
"""An answer counts as right only word for word; a longer one is seldom said twice in the same words."""
UNREAD = "not readable"
"""A part of a reply, not a question."""
UNKNOWN = "not answered with the passage before it"
KNOWN = "known already"


@dataclass(frozen=True)
class Asked:
    """A question with what it can be checked by."""

    row: dict[str, Any]
    """As a line of a questions file."""
    origin: str
    """Where it comes from, for error messages."""
    passage: Passage | None = None
    """The passage that it will be taught with."""

    def example(self, shown: bool) -> Example:
        """The question as the student gets it; the passage goes before it where it is ``shown``."""
        question, answer = self.row["question"], self.row["answer"].strip()
        text = after_reading(self.passage.text, question) if shown and self.passage else question
        return Example(
            self.origin, ({"role": "user", "content": text},), {"role": "assistant", "content": answer},
            metadata=wanted(self.row), origin=self.origin,
        )  # fmt: skip


@dataclass(frozen=True)
class Student:
    """The model that is to be taught: it says what it knows, and is a Writer too."""

    engine: RolloutEngine
    renderer: Renderer
    seed: int = 0

    def __call__(self, passages: Sequence[Passage], progress: Progress) -> list[str]:
        """See Writer. Raises InputError for a passage that leaves no room in the window."""
        asked = [Example(p.source, conversation(p), None, origin=p.source) for p in passages]
        seeds = [derive_seed(self.seed, "questions", place) for place in range(len(asked))]
        prompts = self._fitting(asked, WRITE.max_new_tokens)
        return [self.renderer.answer(reply) for reply in self.engine.generate(prompts, WRITE, seeds, progress)]

    def knows(self, rows: Sequence[Asked], progress: Progress, shown: bool = False) -> list[bool]:
        """Whether it answers each question right, with the passage before it if ``shown``. Raises InputError for a
        question that does not fit the window."""
        if not rows:
            return []
        tokens = room([row.row["answer"] for row in rows]) + (WRITE.max_new_tokens if self.renderer.marks else 0)
        prompts = self._fitting([row.example(shown) for row in rows], tokens)
        score = score_prompts(self.engine, self.renderer, "questions", prompts, contains.grade, tokens, progress)
        return [item.score >= 1 for item in score.items]

    def _fitting(self, examples: Sequence[Example], tokens: int) -> list[Prompt]:
        prompts = [self.renderer.student_prompt(example) for example in examples]
        for prompt in prompts:
            self.renderer.check_window(prompt, tokens, "student")
        return prompts


def write_questions(passages: Sequence[Passage], writer: Writer, student: Student, reporter: Reporter,
                    who: str) -> tuple[Questions, str]:  # fmt: skip
    """The questions that ``writer``, called ``who``, writes on the passages and that stand every check, and a line on
    what was dropped. Raises InputError where none is left."""
    with reporter.phase("questions: written", len(passages), "passages") as phase:
        replies = writer(passages, _to(phase))
    dropped: Counter[str] = Counter()
    formed = _well_formed(passages, replies, dropped)
    with reporter.phase("questions: asked with the passage", len(formed), "questions") as phase:
        found = student.knows(formed, _to(phase), shown=True)
    answered = _only(formed, found, dropped, UNKNOWN)
    with reporter.phase("questions: asked without it", len(answered), "questions") as phase:
        known = student.knows(answered, _to(phase))
    kept = _only(answered, [not right for right in known], dropped, KNOWN)
    facts = {asked.row["fact"] for asked in kept}
    said = (f"{who}: {_number(len(kept) + dropped.total() - dropped[UNREAD], 'question')} on "
            f"{_number(len(passages), 'passage')}, {len(kept)} kept for {_number(len(facts), 'fact')}")  # fmt: skip
    if reasons := [f"{count} ({reason})" for reason, count in dropped.most_common() if count]:
        said += f"; dropped: {', '.join(reasons)}"
    if not kept:
        raise InputError(f"{said}. Let a larger model write them (--ask URL), or write them yourself (--questions)")
    return Questions(f"the questions of {who}", tuple(enumerate((asked.row for asked in kept), 1))), said


def _number(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _to(phase: Phase) -> Progress:
    return lambda tokens, done: phase.update(done, tokens=tokens)


def _only(rows: Sequence[Asked], good: Sequence[bool], dropped: Counter[str], reason: str) -> list[Asked]:
    kept = [row for row, passed in zip(rows, good, strict=True) if passed]
    dropped[reason] += len(rows) - len(kept)
    return kept


def _well_formed(passages: Sequence[Passage], replies: Sequence[str], dropped: Counter[str]) -> list[Asked]:
    """The questions that need no model to be judged by, each with the passage that it will be taught with."""
    kept: list[Asked] = []
    seen: set[str] = set()
    numbers: Counter[str] = Counter()  # several passages may begin in the same place
    for passage, reply in zip(passages, replies, strict=True):
        facts, unread = parse(reply)
        dropped[UNREAD] += unread
        for fact in facts:
            numbers[passage.source] += 1
            name = f"{passage.source}, fact {numbers[passage.source]}"
            for question in fact.questions:
                row = {"question": " ".join(question.split()), "answer": _bare(fact.answer), "fact": name,
                       "source": passage.file}  # fmt: skip
                if reason := _fault(row, passage, seen):
                    dropped[reason] += 1
                    continue
                seen.add(plain(row["question"]))
                kept.append(Asked(row, passage.source, holding(row, passages)))
    return kept


def _bare(answer: str) -> str:
    """Without quotation marks and a full stop: the grader looks for what is left, to the letter."""
    return " ".join(answer.split()).strip("\"'“”„»«").rstrip(".,;:!?").strip()


def _fault(row: dict[str, Any], passage: Passage, seen: set[str]) -> str | None:
    """Why a question cannot be used; None where it can."""
    if holding(row, [passage]) is None:
        return "the answer is not in the passage"
    if len(words(row["answer"])) > MAX_ANSWER_WORDS:
        return f"an answer of more than {MAX_ANSWER_WORDS} words"
    if plain(row["answer"]) in plain(row["question"]):  # inside a word too: whoever repeats the question would be right
        return "the answer is in the question"
    if len(words(row["question"])) < MIN_WORDS:
        return f"fewer than {MIN_WORDS} words"
    return "asked before" if plain(row["question"]) in seen else None


def pretest(questions: Questions, student: Student, reporter: Reporter) -> tuple[Questions, str]:
    """The questions without those on facts that the student answers right, in all their phrasings, with no passage
    before it; and a line on what was left out. Questions that are tests only stay. Raises InputError where no fact is
    left."""
    rows = [(number, row) for number, row in questions.rows if row.get("kind", "direct") == "direct"]
    with reporter.phase("questions: asked before anything is taught", len(rows), "questions") as phase:
        right = student.knows([Asked(row, f"{questions.place}:{number}") for number, row in rows], _to(phase))
    facts: dict[str, list[bool]] = {}
    for (number, row), good in zip(rows, right, strict=True):
        facts.setdefault(fact_of(number, row), []).append(good)
    known = [fact for fact, answers in facts.items() if all(answers)]
    left = {number for number, row in rows if fact_of(number, row) in known}
    said = (f"{questions.place}: {len(known)} of {_number(len(facts), 'fact')} known already and left out "
            f"({_number(len(left), 'question')})")  # fmt: skip
    if len(known) == len(facts):
        raise InputError(f"{said}: nothing is left to teach")
    return Questions(questions.place, tuple(entry for entry in questions.rows if entry[0] not in left)), said
