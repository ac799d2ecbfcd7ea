"""The report as one HTML file that needs nothing else: no network, no script. Every text in it that a model, a data set
or a settings file wrote is escaped by the template engine and freed of control characters on the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from perdure import __version__
from perdure.files import replace_text
from perdure.report import process, results, words
from perdure.report.numbers import summarise
from perdure.report.record import Record, read_compared, read_record
from perdure.report.samples import samples
from perdure.types import InputError

HERE = Path(__file__).parent
MAX_EVENTS = 200
"""Of the ledger, the last ones."""


def write_report(folder: Path, target: Path | None = None) -> Path:
    """Write the report of the workspace in ``folder`` to ``target`` (default: ``report.html`` in it); returns the path.

    Raises InputError when the folder is no workspace, a file in it is damaged or ``target`` cannot be written.
    """
    target = target or folder / "report.html"
    text = render(read_record(folder), read_compared(folder))
    try:
        replace_text(target, text)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from error
    return target


def render(record: Record, compared: dict[str, Record]) -> str:
    """The page. The same files give the same text."""
    numbers = summarise(record, compared)
    page = {
        "numbers": numbers,
        "sentences": words.sentences(numbers),
        "matrix": results.matrix(numbers),
        "comparison": results.comparison(numbers),
        "prior": results.prior(numbers),
        "verdicts": results.verdicts(record, numbers),
        "curves": process.curves(record, compared),
        "samples": samples(record, numbers),
        "costs": process.costs(numbers),
        "preflights": process.preflights(record),
        "versions": process.versions(record),
        "settings": process.settings(record.config),
        "overrides": process.overrides(record),
        "events": record.ledger[-MAX_EVENTS:],
        "max_events": MAX_EVENTS,
        "as_of": str(record.ledger[-1].get("time", "")) if record.ledger else "",
        "package_version": __version__,
        # Our own file, and nothing in it can close the style element.
        "css": Markup((HERE / "report.css").read_text(encoding="utf-8")),
    }
    return environment().get_template("report.html.jinja").render(page)


def environment() -> Environment:
    """Templates beside this file, escaping on, undefined names an error."""
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": words.percent,
        "interval": words.interval,
        "points": words.points,
        "duration": words.seconds,
        "tokens": words.count,
        "plural": words.plural,
        "method": words.method_label,
        "model": words.model_label,
    }
    return made


def _finalize(value: Any) -> Any:
    """Plain text loses its control characters; markup made by the templates passes, as does None as nothing."""
    if value is None:
        return ""
    return words.safe_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value
