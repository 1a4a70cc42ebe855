"""The page about searching and serving, made of the rows that `tests.support.bench_serve` measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Measured = Mapping[str, Mapping[str, Any]]
HEAD = """# Search and serving

`make bench-serve` measures these rows on the machine it runs on, peers in the same run, and writes this page.

**How these were measured.** 2 cores (x86-64, torch CPU), one thread a process, shared with other work: every row says the load of the
machine when it began, and at a load above 2 wall time is longer than it would be alone: `CPU ms` a question, of all processes that answer,
which a busy machine lengthens less, is what searches are compared by. p50, p95 and p99 are over the questions of one run.
Vectors are made up (width 512, around 20,000 centres in 32 dimensions), weights of late interactions and UNITER are random: time is
measured, and whether the right rows are found, not what a model knows.

## Wanted and measured

"""
NOTES = "## Notes on this run"
"""From here on a page is written by hand, and stays when its figures are written again."""
Cell = Callable[[Measured], tuple[str, bool]]


def page(rows: Measured, before: str = "") -> str:
    """before: the page that is there, whose notes are kept."""
    lines = ["| wanted | measured | met |", "|---|---|---|"]
    for wanted, cell in WANTED:
        try:
            now, met = cell(rows)
        except KeyError:
            now, met = "not measured", False
        lines.append(f"| {wanted} | {now} | {'yes' if met else 'no'} |")
    parts = [HEAD + "\n".join(lines), *(_table(title, rows, starts) for title, starts in TABLES)]
    notes = before[before.index(NOTES) :].rstrip() if NOTES in before else ""
    return "\n\n".join(part for part in [*parts, notes] if part) + "\n"


def _http(rows: Measured) -> tuple[str, bool]:
    row = rows["http/10000/1"]
    said = f"p50 {row['p50 ms']:.0f}, p95 {row['p95 ms']:.0f}, p99 {row['p99 ms']:.0f} ms"
    return f"{said}{_cost(row)}", row["p95 ms"] < 30


def _cost(row: Mapping[str, Any]) -> str:
    """The load at which a row was measured, and the CPU that a question took where it was counted."""
    return f" at a load of {row['load']}" + (f"; {row['CPU ms']:.0f} CPU ms" if "CPU ms" in row else "")


def _engine(rows: Measured) -> tuple[str, bool]:
    own, product = rows["engine/1000000/1"]["CPU ms"], rows["numpy/1000000/1"]["CPU ms"]
    return f"{own / product:.2f} x ({own:.0f} against {product:.0f} CPU ms, the best ten taken in both)", own <= 1.2 * product


def _faiss(rows: Measured) -> tuple[str, bool]:
    row = rows["faiss-engine/1000000/1"]
    met = row["recall@10"] >= 0.95 and row["p95 ms"] < 20
    return f"recall@10 {row['recall@10']:.3f}, p50 {row['p50 ms']:.1f}, p95 {row['p95 ms']:.1f} ms{_cost(row)}", met


def _rerank(kind: str, most: float) -> Cell:
    def cell(rows: Measured) -> tuple[str, bool]:
        row = rows[f"rerank/{kind}/100"]
        said = f"p50 {row['p50 ms']:.0f}, p95 {row['p95 ms']:.0f} ms{_cost(row)}"
        return said, row["p50 ms"] < most

    return cell


def _load(rows: Measured) -> tuple[str, bool]:
    row = rows["load/60/16"]
    said = f"{row['failed']} of {row['n']:,} failed in {row['s']:.0f} s; replicas {row['MB']:.0f} MB, at the end {row['MB later']:.0f} MB"
    return said, row["failed"] == 0 and row["MB later"] < 1.03 * row["MB"]


WANTED: tuple[tuple[str, Cell], ...] = (
    ("10,000 images, exact, one client, from a sentence to ids over HTTP with MiniLM: p95 < 30 ms", _http),
    ("1 million vectors, exact: at most 1.2 x a float32 product of NumPy in memory", _engine),
    ("1 million, `--faiss recall=.95`: recall@10 >= .95 in < 20 ms (p95)", _faiss),
    ("re-ranking 100 images of 36 stored regions by SCAN: < 40 ms (median)", _rerank("scan", 40)),
    ("the same by SGR: < 140 ms (median)", _rerank("sgr", 140)),
    ("the same by UNITER-base: measured", _rerank("uniter", float("inf"))),
    ("16 clients, a replica killed, an alias moved twice, an index added to: none failed, memory flat", _load),
)
TABLES = (
    ("Exact searches through the engine: rows, clients", ("engine/",)),
    ("faiss through the engine", ("faiss-build/", "faiss-engine/")),
    ("Peers, by themselves: rows, clients", ("numpy/", "faiss/", "hnswlib/", "usearch/")),
    ("Re-ranking 100 images", ("rerank/",)),
    ("Over HTTP: rows, clients", ("http/",)),
    ("Under load: images, clients", ("load/",)),
    ("Writing an index of given vectors", ("build/",)),
)


def _table(title: str, rows: Measured, starts: tuple[str, ...]) -> str:
    """An empty cell was not measured."""
    chosen = {name: row for name, row in rows.items() if name.startswith(starts)}
    if not chosen:
        return ""
    columns = list(dict.fromkeys(key for row in chosen.values() for key in row))
    lines = [f"## {title}", "", "| row | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(_said(row.get(key, "")) for key in columns) + " |" for name, row in chosen.items()]
    return "\n".join(lines)


def _said(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}" if isinstance(value, float) else str(value)
