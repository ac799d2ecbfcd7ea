"""Smart-home commands: utterance -> intent and slots, drawn from Home Assistant's own English sentence grammar.

The grammar is parsed by hassil, the library it was written for; this file only walks the parsed expressions at random
instead of enumerating them (there are billions). Whole sentence templates are held out for the test rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.files import package_file
from perdure.importers.base import Row, write_skill
from perdure.types import InputError

PACKAGE = "home-assistant-intents==2026.10.27"
FILE_SHA256 = "0b9d606a216b1712409a3d822a8edfb9ff4458e51e421792882ea24e0ce1d456"
SYSTEM = "Turn the smart-home command into an intent."

AREAS = ("kitchen", "living room", "bedroom", "bathroom", "garage", "hallway", "office", "basement", "attic",
         "dining room", "guest room", "nursery", "laundry room", "patio", "garden", "library")  # fmt: skip
ITEMS = ("milk", "eggs", "bread", "coffee", "apples", "rice", "butter", "soap", "batteries", "olive oil", "cheese",
         "light bulbs", "tomatoes", "paper towels", "dog food", "orange juice")  # fmt: skip
SLOTS: dict[str, tuple[Any, ...]] = {
    "area": AREAS,
    "shopping_list_item": ITEMS,
    "temperature": tuple(range(15, 29)),
    "brightness": tuple(range(5, 101, 5)),
    "volume": tuple(range(5, 101, 5)),
    "position": tuple(range(5, 101, 5)),
    "fan_speed": tuple(range(10, 101, 10)),
    "timer_minutes": tuple(range(2, 60)),
    "timer_hours": tuple(range(2, 13)),
}
"""What a home fills in: the grammar leaves rooms and items open, its number ranges are narrowed to common values."""
INTENTS = (
    "HassClimateGetTemperature",
    "HassClimateSetTemperature",
    "HassFanSetSpeed",
    "HassLightSet",
    "HassMediaNext",
    "HassMediaPause",
    "HassMediaPrevious",
    "HassSetVolume",
    "HassShoppingListAddItem",
    "HassShoppingListCompleteItem",
    "HassStartTimer",
    "HassTurnOff",
    "HassTurnOn",
    "HassVacuumCleanArea",
)
IN_TEST = 0.25
"""Share of each intent's sentence templates held out."""


class _CannotFill(Exception):
    """A template needs a list that a home would have to define (device names, floors): it is left out."""


def build(target: Path, seed: int = 0, train_rows: int = 480, test_rows: int = 240) -> Path:
    """Write the skill folder. Raises InputError when the package or hassil is missing."""
    file = package_file(PACKAGE, "home_assistant_intents", "data/en.json", FILE_SHA256)
    grammar = Grammar(json.loads(file.read_text(encoding="utf-8")))
    templates = {intent: grammar.templates(intent) for intent in INTENTS}
    rng = random.Random(f"{seed}/home-assistant")
    held_out = {intent: hold_out(sentences, rng) for intent, sentences in templates.items()}
    train = _rows(
        grammar, {i: [t for t in templates[i] if t not in held_out[i]] for i in INTENTS}, train_rows, rng, set()
    )
    test = _rows(grammar, held_out, test_rows, rng, {row["prompt"] for row in train})
    settings = {
        "name": "smart-home",
        "description": "Home commands to intent and slots as JSON; test sentences follow templates never trained.",
        "licence": "Apache-2.0 (package), CC BY 4.0 (sentences)",
        "source": PACKAGE,
        "grader": "json",
        "max_new_tokens": 40,
        "system": SYSTEM,
    }
    return write_skill(target, settings, train, test)


def hold_out(sentences: list[Template], rng: random.Random) -> list[Template]:
    count = max(1, round(len(sentences) * IN_TEST)) if len(sentences) > 1 else 0
    return rng.sample(sentences, count)


def _rows(grammar: Grammar, templates: Mapping[str, list[Template]], count: int, rng: random.Random,
          known: set[str]) -> list[Row]:  # fmt: skip
    """``count`` distinct commands not in ``known``, the intents in turn."""
    intents = [intent for intent in INTENTS if templates[intent]]
    rows: dict[str, Row] = {}
    attempts = 0
    while len(rows) < count:
        attempts += 1
        if attempts > 100 * count:
            raise InputError(f"only {len(rows)} distinct commands were found, {count} wanted: ask for fewer rows")
        intent = intents[attempts % len(intents)]
        text, slots = grammar.draw(rng.choice(templates[intent]), rng)
        if text in rows or text in known:
            continue
        answer = json.dumps({"intent": intent, **dict(sorted(slots.items()))}, ensure_ascii=False)
        rows[text] = {"prompt": text, "completion": answer}
    return list(rows.values())


class Template:
    """One sentence of the grammar with the slots that are fixed for it."""

    def __init__(self, expression: Any, slots: Mapping[str, Any], rules: Mapping[str, Any], lists: Mapping[str, Any]):
        self.expression = expression
        self.slots = slots
        self.rules = rules
        self.lists = lists


class Grammar:
    """Home Assistant's sentences, parsed by hassil."""

    def __init__(self, raw: dict[str, Any]):
        try:
            from hassil.intents import Intents
        except ImportError as error:
            raise InputError("smart-home sentences need hassil: pip install 'hassil>=3.12'") from error
        self._intents = Intents.from_dict(raw)

    def templates(self, intent: str) -> list[Template]:
        """Sentence templates of one intent that can be filled without knowing the devices of a particular home."""
        found = []
        for block in self._intents.intents[intent].data:
            if block.requires_context or not all(isinstance(value, (str, int)) for value in block.slots.values()):
                continue
            rules = {**self._intents.expansion_rules, **block.expansion_rules}
            lists = {**self._intents.slot_lists, **block.slot_lists}
            for sentence in block.sentences:
                template = Template(sentence.expression, block.slots, rules, lists)
                if self._fillable(template):
                    found.append(template)
        return found

    def _fillable(self, template: Template) -> bool:
        # Optional parts may hide a list that a home must define, so several draws are tried.
        try:
            for attempt in range(8):
                self.draw(template, random.Random(attempt))
        except _CannotFill:
            return False
        return True

    def draw(self, template: Template, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """A random sentence of the template and its slots."""
        slots = dict(template.slots)
        text = _draw(template.expression, template, slots, rng)
        return " ".join(text.split()), slots


def _draw(expression: Any, template: Template, slots: dict[str, Any], rng: random.Random) -> str:
    """Walk a hassil expression, choosing at random where it offers a choice."""
    from hassil import expression as e

    if isinstance(expression, e.TextChunk):
        return expression.original_text
    if isinstance(expression, e.Alternative):
        return _draw(rng.choice(expression.items), template, slots, rng)
    if isinstance(expression, e.Permutation):
        items = rng.sample(expression.items, len(expression.items))
        return " ".join(_draw(item, template, slots, rng) for item in items)
    if isinstance(expression, e.Group):
        return "".join(_draw(item, template, slots, rng) for item in expression.items)
    if isinstance(expression, e.RuleReference):
        return _draw(template.rules[expression.rule_name].expression, template, slots, rng)
    assert isinstance(expression, e.ListReference), expression
    text, slots[expression.slot_name] = _value(expression.list_name, template, rng)
    return text


def _value(name: str, template: Template, rng: random.Random) -> tuple[str, Any]:
    """What is said for a list, and what goes into its slot."""
    from hassil.intents import TextSlotList

    if name in SLOTS:
        value = rng.choice(SLOTS[name])
        return str(value), value
    entry = template.lists.get(name)
    if not isinstance(entry, TextSlotList) or not entry.values:
        raise _CannotFill(name)
    value = rng.choice(entry.values)
    return _draw(value.text_in, template, {}, rng), value.value_out
