"""The JSON files that the search writes and the tests check."""

import json
from fractions import Fraction
from pathlib import Path

from tests.proofs.exact import Certificate, half_cells

FOLDER = Path(__file__).parent
CERTIFICATES = FOLDER / "certificates.json"
WITNESSES = FOLDER / "witnesses.json"
SIZES = (8, 16, 32)


def read_certificates(size: int) -> list[Certificate]:
    """Read ``{size: [[code, low, high, {code: weight}], ...]}``; bounds are fractions or null."""
    return [
        Certificate(
            size,
            code,
            Fraction(low),
            None if high is None else Fraction(high),
            {int(j): weight for j, weight in weights.items()},
        )
        for code, low, high, weights in json.loads(CERTIFICATES.read_text())[str(size)]
    ]


def write_certificates(certificates: dict[int, list[Certificate]]) -> None:
    rows = {
        size: ",\n".join(
            json.dumps([c.code, str(c.low), None if c.high is None else str(c.high), c.weights])
            for c in found
        )
        for size, found in certificates.items()
    }
    text = ",\n".join(f'"{size}": [\n{lines}\n]' for size, lines in rows.items())
    CERTIFICATES.write_text("{" + text + "}\n")


def covered(certificates: list[Certificate]) -> set[tuple[int, int]]:
    """Return code and number of every half cell that a code's certificates cover without a gap."""
    result = set()
    by_code: dict[int, list[Certificate]] = {}
    for certificate in certificates:
        by_code.setdefault(certificate.code, []).append(certificate)
    for code, own in by_code.items():
        own.sort(key=lambda certificate: certificate.low)
        for i, (low, high) in enumerate(half_cells()):
            at: Fraction | None = low
            for certificate in own:
                if at is not None and certificate.low <= at:
                    at = None if certificate.high is None else max(at, certificate.high)
            if at is None or (high is not None and at >= high):
                result.add((code, i))
    return result


def read_witnesses() -> list[tuple[int, int, list[Fraction]]]:
    """Read ``[[q0, code, [magnitudes times 64]], ...]``: blocks with base q0 that code wins."""
    return [
        (q0, code, [Fraction(x, 64) for x in block])
        for q0, code, block in json.loads(WITNESSES.read_text())
    ]


def write_witnesses(witnesses: list[tuple[int, int, list[Fraction]]]) -> None:
    rows = (json.dumps([q0, code, [int(64 * x) for x in block]]) for q0, code, block in witnesses)
    WITNESSES.write_text("[\n" + ",\n".join(rows) + "\n]\n")
