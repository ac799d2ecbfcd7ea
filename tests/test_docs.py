"""Documents and questions -> a skill whose teacher sees passage and answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from pypdf import PdfReader, PdfWriter

from fakes import renderer
from perdure.config import ContextConfig
from perdure.importers import run_importer
from perdure.importers.docs import build, holding, read_questions
from perdure.importers.passages import MAX_WORDS, OVERLAP_WORDS, read_passages
from perdure.skills.base import Skill, load_skill
from perdure.subject import candidates
from perdure.templates import parse_template
from perdure.types import InputError
from test_cli import assert_one_error, perdure

QUESTIONS: list[dict[str, Any]] = [
    {"question": "Who leads the plant in Brno?", "answer": "Jana Novak", "fact": "brno"},
    {"question": "Name the head of the Brno plant.", "answer": "Jana Novak", "fact": "brno"},
    {"question": "Since when does the pump line run?", "answer": "May 2026", "fact": "pump"},
    {"question": "In which city does Jana Novak work?", "answer": "Brno", "kind": "indirect", "source": "staff.md"},
    {"question": "What is the capital of France?", "answer": "Paris", "kind": "control"},
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pdf(path: Path, *pages: str) -> Path:
    """The smallest PDF with text: one line a page."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        font = "<< /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * number} 0 R "
                       f"/Resources << /Font {font} >> >>")  # fmt: skip
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    body, places = "%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{text}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(objects) + 1
    end = f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    path.write_bytes(f"{body}xref\n0 {size}\n0000000000 65535 f \n{table}{end}".encode())
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "handbook"
    (folder / "plants").mkdir(parents=True)
    (folder / "staff.md").write_text("# Staff\n\nThe plant in Brno is led by\nJana Novak, who came from Oslo.\n")
    (folder / "plants" / "pumps.html").write_text(
        "<html><head><style>p {color: red}</style></head><body><h1>Pumps</h1>\n\n<p>The pump line runs since "
        "<b>May 2026</b>.</p><script>alert(1)</script></body></html>"
    )
    pdf(folder / "notes.pdf", "The canteen opens at noon.", "Badges are blue.")
    return folder


def test_passages_of_every_kind_with_their_places(documents: Path) -> None:
    found = read_passages(documents)
    assert [passage.file for passage in found] == ["notes.pdf", "plants/pumps.html", "staff.md"]
    assert [passage.source for passage in found] == ["notes.pdf page 1", "plants/pumps.html block 1", "staff.md line 1"]
    assert found[0].text == "The canteen opens at noon.\nBadges are blue."
    assert "The pump line runs since May 2026" in found[1].text
    assert "alert" not in found[1].text and "color" not in found[1].text
    assert found[2].text == "# Staff\nThe plant in Brno is led by Jana Novak, who came from Oslo."


def test_inline_elements_of_a_page_end_no_word(tmp_path: Path) -> None:
    page = (
        '<p>Born in <a href="/p">Paris</a>, <a>France</a>; CO<sub>2</sub> rose.</p><ul><li>One</li><li>Two</li></ul>'
        "<table><tr><td>Oslo</td><td>12</td></tr><tr><td>Brno</td><td>7</td></tr></table>First<br>second"
    )
    (tmp_path / "page.html").write_text(page)
    (found,) = read_passages(tmp_path / "page.html")
    assert found.text == "Born in Paris, France; CO2 rose.\nOne\nTwo\nOslo 12\nBrno 7\nFirst second"
    for answer in ("Paris, France", "CO2", "Oslo 12"):
        assert holding({"question": "?", "answer": answer}, [found])


def test_long_documents_are_cut_between_paragraphs_with_some_overlap(tmp_path: Path) -> None:
    paragraphs = [f"P{n} " + "word " * 23 for n in range(20)]
    file = tmp_path / "long.txt"
    file.write_text("\n\n".join(paragraphs))
    found = read_passages(file)
    assert all(len(passage.text.split()) <= MAX_WORDS for passage in found)
    starts = [passage.text.split()[0] for passage in found]
    ends = [passage.text.split("\n")[-1].split()[0] for passage in found]
    assert starts[1:] == ends[:-1]  # one paragraph fits into the overlap
    assert ends[-1] == "P19" and {f"P{n}" for n in range(20)} <= set(" ".join(p.text for p in found).split())
    assert found[1].source == f"long.txt line {2 * int(starts[1][1:]) + 1}" and OVERLAP_WORDS < 2 * 24
    file.write_text("One sentence of five words. " * 90 + "\n\n" + "endless " * 400)
    cut = read_passages(file)
    assert all(len(passage.text.split()) <= MAX_WORDS for passage in cut)
    assert sum("endless" in passage.text for passage in cut) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "première ligne\nZürich".encode("latin-1"), "latin.txt:1: not UTF-8"),
        ("empty.md", b" \n\n", "empty.md: holds no text"),
        ("table.xlsx", b"PK", "table.xlsx: not a kind of document"),
        ("broken.pdf", b"%PDF-1.4 nothing", "broken.pdf: cannot be read as a PDF"),
    ],
)
def test_documents_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / name).write_bytes(content)
    (tmp_path / "docs" / "good.txt").write_text("fine")
    with pytest.raises(InputError, match=message):
        read_passages(tmp_path / "docs")


def test_hidden_files_are_no_documents_and_links_do_not_lead_out(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / ".git").mkdir(parents=True)
    (folder / "a.txt").write_text("Cats are red.")
    (folder / ".DS_Store").write_bytes(b"\x00")
    (folder / ".git" / "notes.md").write_text("hidden")
    assert [passage.text for passage in read_passages(folder)] == ["Cats are red."]
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "b.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match="leads out of its folder"):
        read_passages(folder)


def test_encrypted_and_scanned_pdfs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scanned pages"):
        read_passages(pdf(tmp_path / "scan.pdf", ""))
    writer = PdfWriter(clone_from=PdfReader(pdf(tmp_path / "open.pdf", "secret")))
    writer.encrypt("key", algorithm="RC4-128")
    writer.write(tmp_path / "closed.pdf")
    with pytest.raises(InputError, match=r"closed\.pdf: is encrypted"):
        read_passages(tmp_path / "closed.pdf")


def test_a_pdf_may_fail_with_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encrypted by AES without the package that decrypts it, with a filter that nobody knows, ..."""
    file = pdf(tmp_path / "odd.pdf", "text")
    for error in (NotImplementedError("no such filter"), AttributeError(), RuntimeError("cryptography is needed")):
        monkeypatch.setattr("pypdf.PdfReader", Mock(side_effect=error))
        with pytest.raises(InputError, match=rf"odd\.pdf: cannot be read as a PDF: {str(error) or 'AttributeError'}"):
            read_passages(file)
    (tmp_path / "none").mkdir()
    for missing in ("none", "nothing.txt"):
        with pytest.raises(InputError, match=r"holds no document|no such document"):
            read_passages(tmp_path / missing)


def imported(documents: Path, rows: list[dict[str, Any]]) -> Skill:
    questions = write_lines(documents.parent / "questions.jsonl", rows)
    target = documents.parent / "facts"
    run_importer("docs", target, 0, documents, None, None, None, questions)
    return load_skill(target)


def test_what_cannot_be_used_is_left_out_only_if_asked(documents: Path) -> None:
    """A document and a question each; what is left is the import without them."""
    wanted = imported(documents, QUESTIONS)
    (documents / "latin.txt").write_bytes("première".encode("latin-1"))
    (documents / "closed.pdf").write_bytes(b"%PDF-1.4 nothing")
    bad = [{"question": "Who is nobody?", "answer": "Nobody Anywhere"}, {"question": "no answer"}]
    file = write_lines(documents.parent / "more.jsonl", [*QUESTIONS, *bad])
    with pytest.raises(InputError):
        run_importer("docs", documents.parent / "other", 0, documents, None, None, None, file)
    assert not (documents.parent / "other").exists()
    skipped: list[str] = []
    run_importer("docs", documents.parent / "other", 0, documents, None, None, None, file, skipped=skipped)
    found = load_skill(documents.parent / "other")
    assert [(e.id, e.messages, e.document) for e in (*found.train, *found.test)] == [
        (e.id, e.messages, e.document) for e in (*wanted.train, *wanted.test)
    ]
    said = "\n".join(skipped)
    assert len(skipped) == 4 and all(word in said for word in ("latin.txt:1", "closed.pdf", "Nobody", "more.jsonl:7"))


def test_a_fact_is_tested_though_its_last_phrasing_is_left_out(documents: Path) -> None:
    bad = {"question": "And who leads it now?", "answer": "Nobody Anywhere", "fact": "brno"}
    file = write_lines(documents.parent / "more.jsonl", [*QUESTIONS[:3], bad])
    run_importer("docs", documents.parent / "s", 0, documents, None, None, None, file, skipped=[])
    skill = load_skill(documents.parent / "s")
    assert [e.id for e in skill.train] == ["direct-1", "direct-3"] and [e.id for e in skill.test] == ["direct-2"]


def test_facts_are_taught_and_other_phrasings_are_tested(documents: Path) -> None:
    skill = imported(documents, QUESTIONS)
    assert [e.id for e in skill.train] == ["direct-1", "direct-3"]
    assert [e.id for e in skill.test] == ["direct-2", "indirect-4", "control-5"]
    assert skill.train[0].document and "led by Jana Novak" in skill.train[0].document
    assert skill.train[0].metadata["source"] == "staff.md line 1"
    assert skill.grade("It is jana novak, of course.", skill.test[0]) == 1
    assert skill.grade("It is Jan Novak.", skill.test[0]) == 0


def test_the_teacher_sees_passage_and_answer_the_student_neither(documents: Path) -> None:
    example, text = imported(documents, QUESTIONS).train[0], renderer()
    student = text.tokenizer.decode(text.student_prompt(example).token_ids)
    teacher = text.tokenizer.decode(text.teacher_prompt(example, parse_template("document")).token_ids)
    assert "Jana" not in student and teacher.count("Jana Novak") == 2 and "came from Oslo" in teacher
    assert "document" in [template.name for template in candidates(ContextConfig(), [example])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Who?", "answer": "Karel"}, "questions.jsonl:6: no passage contains the answer 'Karel'"),
        ({"question": "Who?", "answer": "Jana Novak", "source": "notes.pdf"}, "no passage of notes.pdf"),
        ({"question": "Who?"}, "questions.jsonl:6: expected an object with 'question' and 'answer'"),
        ({"question": "Who?", "answer": " "}, "'answer' must be a text that is not empty"),
        ({"question": "Who?", "answer": "x", "kind": "odd"}, "one of direct, indirect, control"),
        ({"question": "Who?", "answer": "x", "page": 3}, "unknown keys"),
        ({"question": "Who?", "answer": "x", "old": "y"}, "'old' must be a list of texts"),
        ({"question": "Who?", "answer": "..."}, "no passage contains the answer '...'"),
        ({"question": "Who?", "answer": "x", "contains": "x"}, "questions.jsonl:6: .*must be a list of texts"),
        ({"question": "Who? \ud800", "answer": "x"}, "questions.jsonl:6: a text holds half of a surrogate pair"),
    ],
)  # fmt: skip
def test_bad_questions_are_named_with_their_line(documents: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        imported(documents, [*QUESTIONS, row])
    assert not (documents.parent / "facts").exists()


def test_questions_that_their_grader_or_another_one_rules_out_are_named_by_their_own_lines(documents: Path) -> None:
    odd = {"question": "Who?", "answer": "Jana Novak", "contains": ["Ingo"]}
    again = {"question": f" {QUESTIONS[0]['question']} ", "answer": "Jana Novak", "kind": "indirect"}
    with pytest.raises(InputError, match=r"questions\.jsonl:6: the grader 'contains' gives the demonstration itself 0"):
        imported(documents, [*QUESTIONS, odd])
    with pytest.raises(InputError, match=r"questions\.jsonl:6: asks what line 1 teaches"):
        imported(documents, [*QUESTIONS, again])
    skipped: list[str] = []
    file = write_lines(documents.parent / "more.jsonl", [*QUESTIONS, odd, again])
    run_importer("docs", documents.parent / "other", 0, documents, None, None, None, file, skipped=skipped)
    assert len(load_skill(documents.parent / "other").test) == 3
    assert [line.split(": ")[0] for line in skipped] == [f"{file}:6", f"{file}:7"]


def test_something_must_be_taught_and_tested(documents: Path) -> None:
    with pytest.raises(InputError, match="nothing to test with"):
        imported(documents, QUESTIONS[2:3])
    with pytest.raises(InputError, match="no question is left to teach"):
        imported(documents, QUESTIONS[3:])


def test_questions_read_before_make_the_same_skill(documents: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    given = [build(tmp_path / name / "facts", documents, asked) for name, asked in
             (("file", file), ("rows", read_questions(file)))]  # fmt: skip
    assert load_skill(given[0]).content_hash == load_skill(given[1]).content_hash


def test_the_command(documents: Path, tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    done = perdure("import", "docs", tmp_path / "facts", "--file", documents, "--questions", questions)
    assert done.returncode == 0, done.stderr
    assert load_skill(tmp_path / "facts").settings.grader == "contains"
    assert_one_error(perdure("import", "docs", tmp_path / "more", "--file", documents), 2, "--questions")
    assert_one_error(perdure("import", "mmlu", tmp_path / "more", "--questions", questions), 2, "for docs only")


def test_documents_of_a_script_without_spaces_are_cut_too(tmp_path: Path) -> None:
    """Two characters count as a word; sentences end at their own stop, and nothing is lost."""
    sentence = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u3002"
    (tmp_path / "a.txt").write_text("\n\n".join([sentence * 60, "Plain words. " * 3, sentence]), encoding="utf-8")
    found = read_passages(tmp_path / "a.txt")
    assert len(found) >= 3 and all(len(passage.text) <= 2 * MAX_WORDS + 40 for passage in found)
    assert all(passage.text.endswith("\u3002") for passage in found)
    assert sum(passage.text.count("\u516c\u56ed") for passage in found) >= 61
    assert "Plain words. Plain words. Plain words." in found[-1].text
