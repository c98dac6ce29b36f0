"""One HTML file about a model and its quantization: gaps to the best scales, offsets, sensitivity.

Nothing is loaded from anywhere: pictures are SVG inside the file. Works in light and dark.
"""

import html
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from scalesweep_hf.evaluate.gaps import WINDOWS, Gap
from scalesweep_hf.files import write_text

matplotlib.use("agg")

COLOURS = {
    "absmax": "#c0504d",
    "four_over_six": "#d99a3a",
    "mse": "#3f9c6b",
    "wmse": "#3b78c3",
    "hessian": "#8c7b6b",
    "nearest E4M3": "#8a63b3",
}
KINDS = ("weights", "activations", "keys", "values", "queries")
ERRORS = {"mse": "squared error", "wmse": "importance-weighted error"}
INK = "#808080"  # readable on light and on dark
MB = 1e6
MOST_SENSITIVE = 20

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } #gaps th { cursor: pointer; }
.wide { overflow-x: auto; max-height: 40rem; } #gaps th { position: sticky; top: 0;
background: Canvas; }
"""
SORT = """
document.querySelectorAll('#gaps th').forEach((th, column) => th.addEventListener('click', () => {
  const body = document.querySelector('#gaps tbody'), up = th.dataset.up !== 'yes';
  document.querySelectorAll('#gaps th').forEach(other => delete other.dataset.up);
  th.dataset.up = up ? 'yes' : 'no';
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  [...body.rows].sort((a, b) => {
    const x = value(a), y = value(b), d = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? d : -d;
  }).forEach(row => body.append(row));
}));
"""


def write_report(
    path: Path,
    *,
    about: dict[str, str],
    gaps: Sequence[Gap],
    sensitivity: dict[str, float],
    size: dict[str, int],
) -> None:
    """Write the report; the file appears under its name only when whole.

    Args:
        path: of the HTML file.
        about: what was measured: lines of a table.
        gaps: of every tensor, by both errors.
        sensitivity: KL when one Linear alone is quantized, by its name.
        size: bytes of the parameters: "before", "after" and "quantized", which part of before is
            quantized.
    """
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>ScaleSweep report: {html.escape(about['model'])}</title><style>{STYLE}</style>",
        f"</head><body><h1>{html.escape(about['model'])}</h1>{_facts(about | _sizes(size))}",
        "<h2>How near the scales come to the best</h2>",
        "<p>The error beyond that of the optimal float32 scale of every block, in percent of it, "
        'averaged over the tensors of a kind. "nearest E4M3" rounds that optimal scale to the '
        'better of its two E4M3 neighbours; "hessian" minimises another error, that of the output. '
        "Lower is better.</p>",
        *(
            _figure(_mean_gaps(gaps, error), f"Gap under {label}")
            for error, label in ERRORS.items()
        ),
        "<h2>Layer by layer</h2>",
        *(_figure(_gaps_by_layer(gaps, kind), f"{kind}, weighted error") for kind in _kinds(gaps)),
        "<h2>Which scales are chosen</h2>",
        "<p>E4M3 codes between the AbsMax scale (0) and the optimum over all 126 codes; "
        f"{_edges(gaps)}</p>",
        *(_figure(_offsets(gaps, error), f"Offsets, {label}") for error, label in ERRORS.items()),
        "<h2>Which layers matter</h2>",
        "<p>KL divergence in nats per token when this Linear's weight alone is quantized (mse), "
        f"the {min(MOST_SENSITIVE, len(sensitivity))} largest.</p>",
        _figure(_sensitivity(sensitivity), "Sensitivity"),
        "<h2>Every tensor</h2><p>Click a head to sort.</p>",
        _table(gaps, sensitivity),
        f"<script>{SORT}</script></body></html>",
    ]
    write_text(path, "\n".join(parts))


def to_json(gaps: Sequence[Gap], sensitivity: dict[str, float], size: dict[str, int]) -> str:
    """Return what the report shows, as JSON."""
    content = {"gaps": [vars(gap) for gap in gaps], "sensitivity": sensitivity, "bytes": size}
    return json.dumps(content, indent=2)


def _facts(facts: dict[str, str]) -> str:
    rows = (
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _sizes(size: dict[str, int]) -> dict[str, str]:
    before, after, quantized = size["before"], size["after"], size["quantized"]
    return {
        "memory before": f"{before / MB:,.1f} MB",
        "memory after": f"{after / MB:,.1f} MB, {before / after:.2f} times smaller",
        "of it quantized": f"{quantized / MB:,.1f} MB, {100 * quantized / before:.1f} %",
    }


def _kinds(gaps: Iterable[Gap]) -> list[str]:
    found = {gap.kind for gap in gaps}
    return [kind for kind in KINDS if kind in found]


def _mean_gaps(gaps: Sequence[Gap], error: str) -> Figure:
    kinds = _kinds(gaps)
    figure, axes = _axes(8, 3)
    width = 0.8 / len(COLOURS)
    for i, (objective, colour) in enumerate(COLOURS.items()):
        means = []
        for kind in kinds:
            mine = [g.gaps for g in gaps if g.kind == kind and g.error == error]
            means.append(100 * sum(g.get(objective, math.nan) for g in mine) / len(mine))
        places = [k + (i - 2.5) * width for k in range(len(kinds))]
        axes.bar(places, means, width, color=colour, label=objective)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("gap, %")
    _legend(axes)
    return figure


def _gaps_by_layer(gaps: Sequence[Gap], kind: str) -> Figure:
    mine = [gap for gap in gaps if gap.kind == kind and gap.error == "wmse"]
    figure, axes = _axes(8, 2.6)
    for objective, colour in COLOURS.items():
        values = [100 * gap.gaps[objective] for gap in mine if objective in gap.gaps]
        if not values:  # "hessian" is for weights
            continue
        axes.plot(range(len(values)), values, color=colour, label=objective, marker=".", lw=1)
    axes.set_ylabel("gap, %")
    axes.set_xlabel(f"{kind}, in model order")
    _legend(axes)
    return figure


def _offsets(gaps: Sequence[Gap], error: str) -> Figure:
    kinds = _kinds(gaps)
    figure, axes = _axes(8, 2.6)
    for i, kind in enumerate(kinds):
        counts: Counter[int] = Counter()
        for gap in gaps:
            if gap.kind == kind and gap.error == error:
                counts.update(gap.offsets)
        total = counts.total()
        keys = range(WINDOWS[error][0] - 1, WINDOWS[error][1] + 2)
        places = [key + (i - len(kinds) / 2) * 0.8 / len(kinds) for key in keys]
        shares = [100 * counts[key] / total for key in keys]
        axes.bar(places, shares, 0.8 / len(kinds), label=kind)
    axes.set_ylabel("share of blocks, %")
    axes.set_xticks(keys)
    axes.set_xlabel("E4M3 codes from the AbsMax scale")
    _legend(axes)
    return figure


def _sensitivity(sensitivity: dict[str, float]) -> Figure:
    worst = sorted(sensitivity.items(), key=lambda item: -item[1])[:MOST_SENSITIVE][::-1]
    figure, axes = _axes(8, 0.6 + 0.24 * max(len(worst), 1))
    axes.barh([name for name, _ in worst], [value for _, value in worst], color=COLOURS["wmse"])
    axes.set_xlabel("KL, nats per token")
    return figure


def _edges(gaps: Sequence[Gap]) -> str:
    texts = []
    for error, label in ERRORS.items():
        shares = [gap.edge for gap in gaps if gap.error == error]
        low, high = WINDOWS[error]
        share = 100 * sum(shares) / max(len(shares), 1)
        texts.append(
            f"{share:.2f} % of blocks lie at or beyond an end of [{low}, {high}] ({label})"
        )
    return "; ".join(texts) + "."


def _table(gaps: Sequence[Gap], sensitivity: dict[str, float]) -> str:
    heads = ["tensor", "kind", "error", *COLOURS, "at window's edge, %", "KL alone"]
    rows = []
    for gap in gaps:
        kl = sensitivity.get(gap.module) if gap.kind == "weights" else None
        numbers = [100 * gap.gaps.get(name, math.nan) for name in COLOURS] + [100 * gap.edge]
        cells = [f"<td>{html.escape(text)}</td>" for text in (gap.module, gap.kind, gap.error)]
        cells += [_cell(value, ".2f") for value in numbers]
        cells.append(_cell(math.nan if kl is None else kl, ".2e"))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    return (
        f"<div class='wide'><table id='gaps'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(value: float, style: str) -> str:
    if math.isnan(value):  # not measured: sorted before all that was
        return "<td data-value='-1'></td>"
    return f"<td data-value='{value:.6g}'>{value:{style}}</td>"


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _legend(axes: Any) -> None:
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
    axes.legend(frameon=False, labelcolor=INK, ncols=6, fontsize="small", **above)


def _figure(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    label = html.escape(title)
    caption = f"<figcaption>{label}</figcaption>"
    return f"<figure role='img' aria-label='{label}'>{caption}{svg}</figure>"
