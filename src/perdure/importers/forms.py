"""Twelve small office skills, generated: a line of text -> the same thing in a fixed form. No package is needed.

They make long chains cheap to run: every one is new to the base model, has one right answer and takes few tokens.
A test row is a combination that no training row has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from perdure.importers.base import Row, write_skill

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
FIRST = ("Anna", "Bruno", "Clara", "David", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karin", "Louis",
         "Maria", "Nadia", "Oscar", "Paula", "Quentin", "Rosa", "Simon", "Teresa")  # fmt: skip
LAST = ("Abbott", "Baker", "Carter", "Dixon", "Evans", "Fisher", "Grant", "Hayes", "Irwin", "Jensen", "Keller", "Lopez",
        "Morris", "Nolan", "Owens", "Porter", "Quinn", "Reed", "Stone", "Turner")  # fmt: skip
GOODS = ("apples", "bolts", "cables", "desks", "erasers", "folders", "gloves", "hammers", "inks", "jackets", "kettles",
         "lamps", "mugs", "nails", "ovens", "pens", "quilts", "rulers", "screws", "towels")  # fmt: skip
CITIES = ("Lyon", "Porto", "Ghent", "Turin", "Bergen", "Malmo", "Cork", "Leeds", "Graz", "Basel", "Gdansk", "Brno",
          "Split", "Riga", "Tartu", "Vigo", "Nancy", "Bonn", "Delft", "Aarhus")  # fmt: skip
STREETS = ("Mill Lane", "High Street", "Park Road", "Station Road", "Church Lane", "Victoria Road", "Green Lane",
           "Queen Street", "North Road", "King Street", "Manor Road", "Grange Road")  # fmt: skip
COLOURS = ("red", "blue", "green", "black", "white", "grey", "brown", "yellow")
SERVICES = ("billing", "search", "login", "mail", "backup", "export", "cache", "upload")
TROUBLES = ("timeout", "disk full", "bad token", "no route", "low memory", "missing file")
UNITS = {"kilometres": "km", "metres": "m", "kilograms": "kg", "grams": "g", "litres": "l", "hours": "h",
         "minutes": "min", "watts": "W"}  # fmt: skip
TOPICS = ("report", "budget", "minutes", "photo", "invoice", "plan", "slides", "notes")
ENDINGS = ("pdf", "txt", "csv", "png", "docx", "xlsx", "md", "zip")


def _date(rng: random.Random) -> tuple[str, str]:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(2020, 2039)
    lead = rng.choice(("Due on", "Delivered", "Signed on", "Valid until"))
    return f"{lead} {day} {MONTHS[month - 1]} {year}", f"{year}-{month:02d}-{day:02d}"


def _price(rng: random.Random) -> tuple[str, str]:
    whole, cents = rng.randint(1, 99), rng.randint(10, 99)
    unit, sign = rng.choice((("euros", "EUR"), ("dollars", "USD"), ("pounds", "GBP"), ("francs", "CHF")))
    return f"It costs {whole} {unit} and {cents} cents.", f"{sign} {whole}.{cents}"


def _person(rng: random.Random) -> tuple[str, str]:
    title = rng.choice(("Dr.", "Ms", "Mr", "Prof."))
    first, last = rng.choice(FIRST), rng.choice(LAST)
    return f"{title} {first} {last}", f"{last}, {first} ({title.rstrip('.')})"


def _order(rng: random.Random) -> tuple[str, str]:
    place, goods = rng.randrange(len(NUMBERS)), rng.choice(GOODS)
    lead = rng.choice(("I would like", "Please send", "We need", "Can I have"))
    return f"{lead} {NUMBERS[place]} boxes of {goods}.", json.dumps({"item": goods, "boxes": place + 2})


def _address(rng: random.Random) -> tuple[str, str]:
    number, street, city = rng.randint(1, 99), rng.choice(STREETS), rng.choice(CITIES)
    return f"{number} {street}, {city}", f"{city} | {street} | {number}"


def _article(rng: random.Random) -> tuple[str, str]:
    number, colour, size = rng.randint(100, 999), rng.choice(COLOURS), rng.choice("SML")
    return f"item {number} in {colour}, size {size}", f"{size}/{number}/{colour[:3].upper()}"


def _incident(rng: random.Random) -> tuple[str, str]:
    service, trouble, level = rng.choice(SERVICES), rng.choice(TROUBLES), rng.choice(("ERROR", "WARN", "INFO"))
    hour, minute = rng.randint(0, 23), rng.randint(0, 59)
    return f"{hour:02d}:{minute:02d} {level} {service}: {trouble}", f"[{service}] {trouble} ({level.lower()})"


def _measure(rng: random.Random) -> tuple[str, str]:
    unit = rng.choice(tuple(UNITS))
    whole, tenth = rng.randint(1, 99), rng.randint(1, 9)
    return f"{whole} point {tenth} {unit}", f"{whole}.{tenth} {UNITS[unit]}"


def _file(rng: random.Random) -> tuple[str, str]:
    topic, year, ending = rng.choice(TOPICS), rng.randint(2010, 2039), rng.choice(ENDINGS)
    return f"{topic}_{year}.{ending}", f"type={ending} year={year} topic={topic}"


def _meeting(rng: random.Random) -> tuple[str, str]:
    name, hour = rng.choice(FIRST), rng.randint(1, 11)
    day = rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday"))
    half, part = rng.choice(("00", "15", "30", "45")), rng.choice(("am", "pm"))
    clock = hour + 12 * (part == "pm")
    return f"Meet {name} on {day} at {hour}:{half} {part}", f"{day[:2]} {clock:02d}:{half} {name}"


def _stock(rng: random.Random) -> tuple[str, str]:
    goods, left, city = rng.choice(GOODS), rng.randint(10, 99), rng.choice(CITIES)
    return f"In {city} there are {left} {goods} left.", f"{goods}@{city}={left}"


def _mail(rng: random.Random) -> tuple[str, str]:
    first, last = rng.choice(FIRST), rng.choice(LAST)
    firm = rng.choice(("acme", "globex", "initech", "umbra", "vandelay", "hooli"))
    return f"{first} {last} works at {firm}.", f"{first[0].lower()}.{last.lower()}@{firm}.com"


FORMS: dict[str, tuple[str, Callable[[random.Random], tuple[str, str]]]] = {
    "date": ("Write the date.", _date),
    "order": ("Note the order.", _order),
    "person": ("File the name.", _person),
    "price": ("Write the price.", _price),
    "address": ("Sort the address.", _address),
    "incident": ("Log the incident.", _incident),
    "article": ("Code the article.", _article),
    "measure": ("Shorten the measure.", _measure),
    "meeting": ("Enter the meeting.", _meeting),
    "file": ("Describe the file.", _file),
    "stock": ("Record the stock.", _stock),
    "mail": ("Guess the mail address.", _mail),
}
"""Name -> (system prompt, a row from a random source)."""


def build(name: str, target: Path, seed: int = 0, train_rows: int = 480, test_rows: int = 240) -> Path:
    """Write the skill folder of the form ``name``."""
    system, draw = FORMS[name]
    rng, drawn = random.Random(f"{seed}/forms/{name}"), dict[str, str]()
    while len(drawn) < train_rows + test_rows:
        prompt, answer = draw(rng)
        drawn[prompt] = answer
    rows: list[Row] = [{"prompt": prompt, "completion": answer} for prompt, answer in drawn.items()]
    settings = {
        "name": name,
        "description": f"{system[:-1]}: a line of text in a fixed form.",
        "licence": "Apache-2.0",
        "source": "generated by perdure",
        "grader": "exact",
        "max_new_tokens": 24,
        "system": system,
    }
    return write_skill(target, settings, rows[test_rows:], rows[:test_rows])
