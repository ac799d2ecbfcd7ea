"""How a demonstration is shown to the teacher: the context templates by name, and their wording."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.sandbox

from perdure.types import InputError

INLINE_LEAD = "This is an example for a response to the question:"
"""The paper's wording (section 3), as are the two closings."""
INLINE_CLOSE = "Now answer with a response of your own."
INLINE_CLOSE_THINKING = "Now answer with a response of your own, including the thinking process."
DOCUMENT_LEAD = "Read this first:"

_SHOWN = r"(?:example|demonstration|(?:example|earlier|previous) (?:answer|response|turn))"
_LEAK = re.compile(
    r"\b(?:as|like|similar to|following|based on|according to)\s+(?:shown |given |seen )?(?:in\s+)?"
    rf"(?:the|this|that|your)\s+(?:above |previous |given |provided )?{_SHOWN}\b"
    rf"|\b(?:in|from|to)\s+(?:the|this|that|your)\s+(?:above|previous|given|provided)\s+{_SHOWN}\b"
    r"|\b(?:example|demonstration)\s+(?:above|response|provided|given)\b",
    re.IGNORECASE,
)
"""Phrases that point back at something shown. "In this example" alone is ordinary prose and does not count."""


def names_the_example(text: str) -> bool:
    """True when an answer talks about the demonstration that only the teacher saw ("as in the example above")."""
    return _LEAK.search(text) is not None


def after_reading(document: str, question: str) -> str:
    """A question with the document that it is about before it."""
    return f"{DOCUMENT_LEAD}\n{document}\n\n{question}"


@dataclass(frozen=True)
class Template:
    """How the teacher's prompt carries the demonstration."""

    name: str
    """``inline``, ``inline_thinking``, ``turns:N``, ``document``, ``document_turns:N`` or ``jinja:FILE``."""
    kind: str
    repeats: int = 0
    source: jinja2.Template | None = None


def parse_template(name: str) -> Template:
    """Raises InputError for an unknown name, a repeat count below 1 or a Jinja file that cannot be read."""
    kind, _, argument = name.partition(":")
    if kind in ("inline", "inline_thinking", "document") and not argument:
        return Template(name, kind)
    if kind in ("turns", "document_turns") and re.fullmatch(r"[1-9]\d?", argument):
        return Template(name, kind, repeats=int(argument))
    if kind == "jinja" and argument:
        return Template(name, kind, source=_jinja_file(Path(argument)))
    raise InputError(
        f"unknown context template {name!r}: use inline, inline_thinking, turns:N (N from 1 to 99), document, "
        "document_turns:N or jinja:FILE"
    )


def _jinja_file(path: Path) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    try:
        return environment.from_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the context template cannot be read: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{path}:{error.lineno}: the context template is not valid Jinja: {error.message}") from error
