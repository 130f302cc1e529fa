"""The comparison as one HTML file: no network, no library, everything from files escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

from experiments import plots
from experiments.evaluations import Evaluation
from experiments.runs import Point, finite

MISSING = "—"
TOLD = ("checkpoint", "network", "data", "date", "command")  # of a measurement
FIRST = ("train/loss", "val/accuracy", "val/knn_top1", "schedule/lr")

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --rule: #d9dce1;
  --paper: #ffffff; --panel: #f6f7f9; --best: #e3f4e8; --best-ink: #116329;
  --c0: #1f6fd0; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #c2255c;
  --c5: #0b7285; --c6: #946200; --c7: #5f3dc4; --c8: #4a5a68; --c9: #66800b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a0a6ae; --rule: #363b42;
  --paper: #14171a; --panel: #1c2024; --best: #173a24; --best-ink: #8ce0a4;
  --c0: #6db3ff; --c1: #ff9457; --c2: #69db7c; --c3: #e599f7; --c4: #f0558a;
  --c5: #3bc9db; --c6: #ffd43b; --c7: #b197fc; --c8: #b0bcc8; --c9: #c0eb75; } }
* { box-sizing: border-box; }
body { margin: 2rem auto; max-width: 1440px; padding: 0 1.25rem; background: var(--paper);
  color: var(--ink); font: 14px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 1rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p, figcaption, .soft { color: var(--soft); }
a { color: inherit; text-underline-offset: 3px; text-decoration-color: var(--rule); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide > table { min-width: 100%; }
th, td { padding: .38rem .55rem; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
#runs td { white-space: nowrap; } #runs td:nth-child(3) { white-space: normal; min-width: 9.5em;
  text-wrap: balance; }
tr > :first-child { position: sticky; left: 0; background: var(--paper); }
#runs td.number, #runs th.number { text-align: right; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th button:hover { text-decoration: underline; text-underline-offset: 3px; }
th[aria-sort=ascending] button::after { content: "\\2009\\2191"; }
th[aria-sort=descending] button::after { content: "\\2009\\2193"; }
td.best { background: var(--best); color: var(--best-ink); font-weight: 600; }
td[title] { text-decoration: underline dotted var(--soft); text-underline-offset: 3px;
  cursor: help; }
td.missing { color: var(--soft); }
.swatch { display: inline-block; width: 1.5em; height: 8px; margin-right: .5em; overflow: visible; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin-bottom: .8rem; }
.legend button { all: unset; cursor: pointer; font-size: 13px; }
.legend button:focus-visible { outline: 2px solid; }
.legend button[aria-pressed=false] { opacity: .35; text-decoration: line-through; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr));
  gap: 1rem; }
figure { margin: 0; padding: .6rem .6rem .2rem; background: var(--panel); border-radius: 8px; }
figcaption { font: 12.5px ui-monospace, monospace; padding-left: .3rem; }
svg text { fill: var(--soft); font-size: 11px; } .grid { stroke: var(--rule); }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
.line circle { fill: var(--c); stroke: none; } .off { display: none; }
.line:hover { stroke-width: 3; }
details { border-bottom: 1px solid var(--rule); padding: .45rem 0; } summary { cursor: pointer; }
details > div { margin: .5rem 0 .8rem 1rem; }
pre, code { font: 12px/1.5 ui-monospace, monospace; } pre { margin: .3rem 0; overflow-x: auto; }
.small { margin-bottom: .9rem; } .small td, .small th { font-size: 12.5px; padding: .22rem .6rem; }
""" + "".join(f".c{i} {{ --c: var(--c{i}); }}\n" for i in range(plots.COLOURS))

SCRIPT = """
const table = document.getElementById('runs'), body = table.tBodies[0];
const columns = [...table.tHead.rows[0].cells];
columns.forEach((head, i) => head.querySelector('button').addEventListener('click', () => {
  const isNumber = head.classList.contains('number');
  const down = head.ariaSort ? head.ariaSort === 'ascending' : isNumber;
  columns.forEach(other => other.removeAttribute('aria-sort'));
  head.ariaSort = down ? 'descending' : 'ascending';
  const key = row => row.cells[i].dataset.value;
  const order = (a, b) => isNumber ? a - b : a.localeCompare(b, undefined, {numeric: true});
  [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === '' || y === '') return (x === '') - (y === '');  // missing ones come last
    return down ? order(y, x) : order(x, y);
  }).forEach(row => body.append(row));
}));
document.querySelectorAll('.legend button').forEach(button => button.onclick = () => {
  const show = button.ariaPressed === 'false';
  button.ariaPressed = show;
  document.querySelectorAll(`.plots [data-run="${button.dataset.of}"]`)
    .forEach(line => line.classList.toggle('off', !show));
});
const open = () => { const at = document.getElementById(location.hash.slice(1));
  if (at && at.tagName === 'DETAILS') at.open = true; };
addEventListener('hashchange', open); open();
"""

# The browser itself refuses whatever the page might ask of a network.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Cell(NamedTuple):
    """One value of the table.

    text:     what is shown
    value:    what it is sorted by; None for text and for what is missing
    note:     what the value is of, or why it is missing
    is_best:  no other run has a better one
    """

    text: str = MISSING
    value: float | None = None
    note: str = ""
    is_best: bool = False


class Row(NamedTuple):
    """A run as it is shown; cells by column, curves by metric, measurements by protocol."""

    name: str
    path: Path
    cells: dict[str, Cell]
    curves: dict[str, list[Point]]
    evaluations: dict[str, Evaluation]
    config: dict[str, Any]
    versions: str


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """The metrics to draw: the main ones, then whatever else was evaluated."""
    logged = {name for row in rows for name in row.curves}
    others = sorted(name for name in logged - set(FIRST) if name.startswith("val/"))
    return [name for name in (*FIRST, *others) if name in logged]


def swatch(index: int) -> str:
    line = f'<g {plots.look(index)}><line x1="0" x2="20" y1="4" y2="4"/></g>'
    return f'<svg class="swatch" viewBox="0 0 20 8" aria-hidden="true">{line}</svg>'


def table_cell(cell: Cell, is_number: bool) -> str:
    classes = [
        *(["number"] if is_number else []),
        *(["best"] if cell.is_best else []),
        *(["missing"] if cell.text == MISSING else []),
    ]
    by = cell.text if cell.value is None else repr(cell.value)
    key = "" if cell.text == MISSING else escape(by)
    title = f' title="{escape(cell.note)}"' if cell.note else ""
    return f'<td class="{" ".join(classes)}" data-value="{key}"{title}>{escape(cell.text)}</td>'


def main_table(rows: Sequence[Row]) -> str:
    """The table that is sorted by a click on a header."""
    columns = list(rows[0].cells)
    is_number = {name: name not in ("method", "backbone") for name in columns}
    heads = "".join(
        f'<th class="{"number" if is_number[name] else ""}" scope="col">'
        f"<button>{escape(name)}</button></th>"
        for name in columns
    )
    lines = []
    for index, row in enumerate(rows):
        name = escape(row.name)
        cells = "".join(table_cell(cell, is_number[column]) for column, cell in row.cells.items())
        lines.append(
            f'<tr><td data-value="{name}">{swatch(index)}<a href="#run-{index}">{name}</a></td>'
            f"{cells}</tr>"
        )
    return (
        f'<div class="wide"><table id="runs"><thead><tr><th scope="col"><button>run</button></th>'
        f"{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def curve_section(rows: Sequence[Row]) -> str:
    """Every metric in a plot of its own, all runs in each, one legend."""
    metrics = metrics_of(rows)
    if not metrics:
        return "<p>No run has logged a curve.</p>"
    buttons = "".join(
        f'<button aria-pressed="true" data-of="{i}">{swatch(i)}{escape(row.name)}</button>'
        for i, row in enumerate(rows)
    )
    drawn = "".join(
        plots.draw(
            metric,
            {i: (r.name, r.curves[metric]) for i, r in enumerate(rows) if metric in r.curves},
        )
        for metric in metrics
    )
    return f'<div class="legend">{buttons}</div><div class="plots">{drawn}</div>'


def small_table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in lines
    )
    return (
        f'<div class="wide small"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def differences_section(rows: Sequence[Row], differ: Mapping[str, list[str | None]]) -> str:
    if len(rows) < 2:
        return ""
    if not differ:
        return "<h2>What differs in the configs</h2><p>Nothing.</p>"
    lines = (
        [key, *(MISSING if v is None else v for v in values)] for key, values in differ.items()
    )
    table = small_table(["key", *(row.name for row in rows)], lines)
    return f"<h2>What differs in the configs</h2>{table}"


def measurement(protocol: str, found: Evaluation) -> list[str]:
    """One line: every value in percent, and how they were measured."""
    shares = {name: finite(value) for name, value in found["values"].items()}
    values = ", ".join(
        f"{name}: {MISSING if share is None else f'{100 * share:.2f}'}"
        for name, share in shares.items()
    )
    return [protocol, values, *(str(found.get(key, MISSING)) for key in TOLD)]


def run_details(index: int, row: Row) -> str:
    """Where a run is, what was measured of it and how, and its versions."""
    notes = [[name, cell.text, cell.note] for name, cell in row.cells.items() if cell.note]
    parts = [f"<p><code>{escape(str(row.path))}</code></p>"]
    if notes:
        parts.append(small_table(["column", "value", "of"], notes))
    if row.evaluations:
        head = ("protocol", "values", *TOLD)
        parts.append(small_table(head, starmap(measurement, row.evaluations.items())))
    if row.versions:
        parts.append(f"<p>versions.txt</p><pre>{escape(row.versions)}</pre>")
    return (
        f'<details id="run-{index}"><summary>{swatch(index)}{escape(row.name)}</summary>'
        f"<div>{''.join(parts)}</div></details>"
    )


def render(rows: Sequence[Row], differ: Mapping[str, list[str | None]], legend: str) -> str:
    """The whole page.

    Args:
        rows: the runs, at least one.
        differ: the config keys in which they differ, and the value in each run.
        legend: what the columns mean.
    """
    count = "one run" if len(rows) == 1 else f"{len(rows)} runs"
    details = "".join(run_details(index, row) for index, row in enumerate(rows))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Patchlight: {count}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Patchlight: {count}</h1>
{main_table(rows)}
<p>{escape(legend)} {MISSING} is missing.</p>
<h2>Curves over optimizer steps</h2>
{curve_section(rows)}
{differences_section(rows, differ)}
<h2>Runs</h2>
{details}
</body>
<script>{SCRIPT}</script>
</html>
"""
