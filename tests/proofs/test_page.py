"""docs/proof.md says what the certificates say."""

from tests.conftest import ROOT
from tests.proofs.files import SIZES, read_certificates, read_witnesses
from tests.proofs.tables import code_table, down_table

PAGE = (ROOT / "docs" / "proof.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables_of_the_certificates() -> None:
    assert down_table() in PAGE
    assert code_table() in PAGE


def test_the_page_counts_certificates_and_witnesses() -> None:
    counts = [str(len(read_certificates(size))) for size in SIZES]
    assert f"{counts[0]}, {counts[1]} and {counts[2]} certificates" in PAGE
    assert f"{len(read_witnesses())} blocks" in PAGE
