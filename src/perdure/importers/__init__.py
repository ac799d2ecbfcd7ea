"""Known sources as skill folders: one file each. This dict is the registry."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from perdure.importers import (
    bfcl,
    bfcl_multi,
    commands,
    docs,
    facts,
    forms,
    home_assistant,
    jsonl,
    mmlu,
    sciq,
    sst2,
    tldr,
)
from perdure.types import InputError

IMPORTERS: dict[str, Callable[[Path, int], Path]] = {
    "home-assistant": home_assistant.build,
    "bfcl": bfcl.build,
    "bfcl-mixed": bfcl.build_mixed,
    "bfcl-multi": bfcl_multi.build,
    "mmlu": mmlu.build,
    "sst2": sst2.build,
    "tldr": tldr.build,
    "commands": commands.build,
    "sciq": sciq.build,
    "facts": facts.build,
    **{f"forms-{name}": partial(forms.build, name) for name in forms.FORMS},
}
"""Source -> builder of (folder to make, seed). Each raises InputError when its data package is missing."""


_OF_OWN_DATA = {"turns": ("jsonl",), "test_share": ("jsonl",), "questions": ("docs",), "file": ("jsonl", "docs"),
                "grader": ("jsonl", "docs"), "grader_option": ("jsonl",), "skip_bad": ("jsonl", "docs")}  # fmt: skip
"""Option -> the sources that use it; the known ones have their files, graders and splits."""


def check_options(source: str, **given: object) -> None:
    """Raises InputError for an unknown source, and for an option given (not None) that the source does not use."""
    if source not in (*IMPORTERS, "jsonl", "docs"):
        raise InputError(f"unknown source {source!r}: use {', '.join(IMPORTERS)}, docs or jsonl")
    for option, value in given.items():
        if value is not None and source not in _OF_OWN_DATA[option]:
            takes = " and ".join(_OF_OWN_DATA[option])
            raise InputError(f"perdure import {source}: --{option.replace('_', '-')} is for {takes} only")


def run_importer(source: str, target: Path, seed: int, file: Path | None, grader: str | None, test_share: float | None,
                 turns: jsonl.Turns | None = None, questions: Path | docs.Questions | None = None,
                 grader_option: dict[str, Any] | None = None, skipped: list[str] | None = None) -> Path:  # fmt: skip
    """Make a skill folder from a known source, from a JSONL ``file``, or from documents (``file``) and ``questions``.
    Where ``skipped`` is a list, what cannot be used of them is left out, and said there.

    Raises InputError as ``check_options`` does, and where the file is missing."""
    check_options(source, turns=turns, test_share=test_share, questions=questions, file=file, grader=grader,
                  grader_option=grader_option, skip_bad=skipped)  # fmt: skip
    if source == "jsonl":
        if file is None:
            raise InputError("perdure import jsonl: name the demonstrations with --file rows.jsonl")
        return jsonl.build(
            target, seed, file, grader or "exact", 0.2 if test_share is None else test_share, turns or "last",
            grader_option, skipped,
        )  # fmt: skip
    if source == "docs":
        if file is None or questions is None:
            raise InputError(
                "perdure import docs: name document or folder with --file, and --questions FILE (or --ask model)"
            )
        return docs.build(target, file, questions, grader or "contains", skipped)
    return IMPORTERS[source](target, seed)
