"""README and documentation: their code runs, it prints what they say, and what they name exists."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest

import asl_pallas
import asl_pallas.losses

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
_PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)


def blocks_of(page: pathlib.Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_code_of_a_page_runs_and_prints_what_its_comments_say(page, capsys):
    names: dict[str, Any] = {"__name__": "page"}
    code = "\n".join(blocks_of(page))
    exec(compile(code, str(page), "exec", dont_inherit=True), names)
    printed = capsys.readouterr().out.splitlines()
    for said in _PRINTED.findall(code):
        assert any(line and said.startswith(line) for line in printed), (said, printed)


def test_what_explain_prints_is_what_the_questions_show(capsys):
    page = ROOT / "docs" / "faq.md"
    first = blocks_of(page)[0]
    exec(compile(first, str(page), "exec"), {})
    assert f"```\n{capsys.readouterr().out}```" in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+?)(?:#[\w-]*)?\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for name in re.findall(r"`((?:asl_pallas|reference|profiling|examples|tests|kernels|losses)/[\w/.]*\.\w+)`", text):
        assert any((root / name).exists() for root in (ROOT, ROOT / "asl_pallas")), name


def test_the_readme_is_a_front_page():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
    (snippet,) = blocks_of(README)
    assert len(snippet.splitlines()) <= 15


def test_every_page_is_in_the_navigation_and_every_public_name_in_the_reference():
    navigation = (ROOT / "docs" / "index.md").read_text().splitlines()
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert name == "index" or name in navigation
    reference = (ROOT / "docs" / "api.md").read_text()
    for module in (asl_pallas, asl_pallas.losses):
        for name in module.__all__:
            assert re.search(rf":: asl_pallas\.(losses\.)?{name}\n|^`{name}`", reference, re.MULTILINE), name
