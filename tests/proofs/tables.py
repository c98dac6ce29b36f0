"""Print the tables of docs/proof.md from the certificates: ``python -m tests.proofs.tables``."""

import sys
from collections.abc import Iterable

from tests.proofs.exact import candidates
from tests.proofs.files import SIZES, covered, read_certificates, read_witnesses


def table(title: str, columns: Iterable[object], rows: dict[str, list[int] | list[str]]) -> str:
    """Return a Markdown table."""
    head = [title, *map(str, columns)]
    lines = [head, ["---"] * len(head)]
    lines += [[name, *map(str, cells)] for name, cells in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def down_table() -> str:
    """Return how far below q0 an optimum can lie, by size, rounding and mantissa field."""
    rows: dict[str, list[int] | list[str]] = {}
    for size in SIZES:
        proved = covered(read_certificates(size))
        for floored in (False, True):
            lowest = {q0: candidates(q0, proved, size, floored=floored)[0] for q0 in range(1, 127)}
            down = {q0: str(q0 - low) for q0, low in lowest.items()}
            name = f"{size}, {'floored' if floored else 'nearest'}"
            rows[f"{name}, 16-119"] = [down[q0] for q0 in range(16, 24)]
            rows[f"{name}, 120-126"] = [down[q0] for q0 in range(120, 127)] + [""]
            rows[f"{name}, 8-15"] = [down[q0] for q0 in range(8, 16)]
            rows[f"{name}, 1-7"] = ["", *(down[q0] for q0 in range(1, 8))]
    return table("size, q0, codes; field:", range(8), rows)


def code_table() -> str:
    """Return every code that wins some block of 16, for the bases where odd codes matter."""
    by_base: dict[int, list[int]] = {}
    for q0, code, _ in read_witnesses():
        by_base.setdefault(q0, []).append(code)
    rows: dict[str, list[int] | list[str]] = {
        str(q0): [" ".join(map(str, sorted(by_base[q0])))] for q0 in range(1, 10)
    }
    return table("q0", ["codes that win a block"], rows)


if __name__ == "__main__":
    sys.stdout.write(down_table() + "\n\n" + code_table() + "\n")
