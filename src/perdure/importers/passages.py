"""Documents -> passages: text, Markdown, HTML and PDF, cut where paragraphs end, each with the place it came from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from perdure.importers.base import refuse_or_skip
from perdure.skills.base import check_inside
from perdure.skills.graders.text import SPACELESS
from perdure.types import InputError

TEXT, HTML, PDF = (".txt", ".md", ".markdown", ".rst"), (".html", ".htm"), (".pdf",)
KINDS = (*TEXT, *HTML, *PDF)
MAX_WORDS = 160
"""Longest passage: with question and answer a few hundred tokens."""
OVERLAP_WORDS = 30
"""A passage begins again with the paragraphs that ended the one before, up to so many words."""


@dataclass(frozen=True)
class Passage:
    """A part of a document that fits in a prompt."""

    text: str
    source: str
    """``guide.pdf page 3`` or ``notes.md line 12``: where it begins."""
    file: str
    """The document's name."""


@dataclass(frozen=True)
class _Paragraph:
    text: str
    source: str

    @property
    def words(self) -> int:
        return len(words(self.text))


def words(text: str) -> list[str]:
    """The words of a text, each with the space behind it; where a script writes no spaces between them, two characters
    count as one."""
    return _WORD.findall(text)


_WORD = re.compile(rf"(?:[{SPACELESS}]{{1,2}}|[^\s{SPACELESS}]+)\s*")


def read_passages(path: Path, skipped: list[str] | None = None) -> list[Passage]:
    """The passages of a document, or of all documents below a folder, in the order of their names.

    Raises one InputError that lists every document that cannot be read or lies elsewhere (a link); nothing is left out
    silently, but what is hidden (``.git``, ``.DS_Store``). Where ``skipped`` is a list it gets those problems, and the
    other documents are read."""
    files = sorted(file for file in path.rglob("*") if _counts(file, path)) if path.is_dir() else [path]
    found: list[Passage] = []
    problems: list[str] = []
    for file in files:
        try:
            if path.is_dir():
                check_inside(path, file)
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            found += [Passage(text, source, name) for text, source in _cut(_paragraphs(file, name))]
        except InputError as error:
            problems.append(str(error))
    if not files:
        problems.append(f"{path}: holds no document ({', '.join(KINDS)})")
    refuse_or_skip(problems, skipped if found else None)
    return found


def _counts(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _paragraphs(file: Path, name: str) -> list[_Paragraph]:
    kind = file.suffix.lower()
    if not file.is_file():
        raise InputError(f"{file}: no such document")
    if kind not in KINDS:
        raise InputError(f"{file}: not a kind of document that is read here; expected one of {', '.join(KINDS)}")
    parts = _pdf(file, name) if kind in PDF else _html(file, name) if kind in HTML else _text(file, name)
    paragraphs = [_Paragraph(text, source) for text, source in parts if text]
    if not paragraphs:
        raise InputError(f"{file}: holds no text" + (" (scanned pages? run them through OCR)" if kind in PDF else ""))
    return paragraphs


def _decoded(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}:{line}: not UTF-8 ({error.reason}); save the document as UTF-8") from error


def _text(file: Path, name: str) -> Iterator[tuple[str, str]]:
    block: list[str] = []
    start = 1
    for number, line in enumerate([*_decoded(file).splitlines(), ""], 1):
        if line.strip():
            start = start if block else number
            block.append(line.strip())
        elif block:
            yield " ".join(block), f"{name} line {start}"
            block = []


BLOCKS = ("p", "div", "section", "article", "main", "header", "footer", "aside", "h1", "h2", "h3", "h4", "h5", "h6",
          "ul", "ol", "li", "dl", "dt", "dd", "table", "tr", "blockquote", "pre", "figure", "figcaption", "form",
          "title")  # fmt: skip
"""Elements of a page that stand by themselves."""
APART = ("td", "th", "br")
"""Elements that end a word, but no block."""


def _html(file: Path, name: str) -> Iterator[tuple[str, str]]:
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise InputError(f"{file}: reading HTML needs Beautiful Soup: pip install 'beautifulsoup4>=4.15'") from error
    page = BeautifulSoup(_decoded(file), "html.parser")
    for unread in page(["script", "style", "noscript", "template", "nav"]):
        unread.decompose()
    for parts, gap in ((BLOCKS, "\n\n"), (APART, " ")):
        for part in page(parts):
            part.insert_before(gap)
            part.insert_after(gap)
    # Nothing between the pieces of a line: a link or a subscript in the middle of a word ends no word.
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", page.get_text()))
    for number, block in enumerate(filter(None, blocks), 1):
        yield block, f"{name} block {number}"


def _pdf(file: Path, name: str) -> Iterator[tuple[str, str]]:
    try:
        from pypdf import PdfReader
    except ImportError as error:
        raise InputError(f"{file}: reading PDF needs pypdf: pip install 'pypdf>=7.1'") from error
    try:
        reader = PdfReader(file)
        if reader.is_encrypted:
            raise InputError(f"{file}: is encrypted; save it without a password")
        pages = [page.extract_text() or "" for page in reader.pages]
    except InputError:
        raise
    except Exception as error:  # a broken file fails anywhere in the reader, and with anything
        raise InputError(f"{file}: cannot be read as a PDF: {str(error) or type(error).__name__}") from error
    for number, text in enumerate(pages, 1):
        for block in re.split(r"\n\s*\n", text):
            yield " ".join(block.split()), f"{name} page {number}"


def _cut(paragraphs: Sequence[_Paragraph]) -> Iterator[tuple[str, str]]:
    """(text, source) of each passage. A paragraph that is too long by itself is cut between sentences."""
    pieces = [piece for paragraph in paragraphs for piece in _sentences(paragraph)]
    taken: list[_Paragraph] = []
    fresh = False
    for piece in pieces:
        if fresh and sum(p.words for p in taken) + piece.words > MAX_WORDS:
            yield "\n".join(p.text for p in taken), taken[0].source
            taken, fresh = _tail(taken, MAX_WORDS - piece.words), False
        taken.append(piece)
        fresh = True
    if fresh:
        yield "\n".join(p.text for p in taken), taken[0].source


def _tail(taken: Sequence[_Paragraph], room: int) -> list[_Paragraph]:
    """The last paragraphs, as far as they fit into the overlap."""
    kept: list[_Paragraph] = []
    for piece in reversed(taken):
        if sum(p.words for p in kept) + piece.words > min(OVERLAP_WORDS, room):
            break
        kept.insert(0, piece)
    return kept


def _sentences(paragraph: _Paragraph) -> Iterator[_Paragraph]:
    """The paragraph, or parts of it of at most MAX_WORDS words."""
    if paragraph.words <= MAX_WORDS:
        yield paragraph
        return
    taken: list[str] = []
    for sentence in re.split(r"(?<=[.!?]\s)|(?<=[\u3002\uff01\uff1f])", paragraph.text):
        for part in _runs(words(sentence)):
            if taken and len(taken) + len(part) > MAX_WORDS:
                yield _Paragraph("".join(taken).strip(), paragraph.source)
                taken = []
            taken += part
    yield _Paragraph("".join(taken).strip(), paragraph.source)


def _runs(of: list[str]) -> list[list[str]]:
    return [of[start : start + MAX_WORDS] for start in range(0, len(of), MAX_WORDS)]
