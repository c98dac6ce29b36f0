"""The documentation: every snippet runs, links lead somewhere, quoted errors exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scalesweep_hf.ops.objectives import OBJECTIVES
from tests.conftest import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
CODE = "\n".join(path.read_text() for path in (ROOT / "scalesweep_hf").rglob("*.py"))


@pytest.fixture
def as_before() -> Iterator[None]:
    names = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(names)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_every_snippet_runs(
    page: Path,
    trained_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_before: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(snippet.replace('"MODEL"', repr(str(trained_model))), names)


def test_there_are_snippets() -> None:
    assert sum(page.read_text().count("```python") for page in DOCS) >= 7


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).is_file(), link
    for path in re.findall(r"`((?:examples|configs)/[\w./]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_quoted_errors_are_those_of_the_code() -> None:
    flat = re.sub(r'"\s*f?"', "", re.sub(r"\s+", " ", CODE))
    for quote in re.findall(r'\*\*"(.*?)"\*\*', (ROOT / "docs" / "faq.md").read_text()):
        for part in filter(None, (piece.strip(" :") for piece in quote.split("…"))):
            assert part in flat, part
