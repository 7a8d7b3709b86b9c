"""The contact sheet of a comparison: one HTML page in its folder, no script, nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from triptych.evaluation.charts import Point, pareto_plot
from triptych.evaluation.compare import read_json, read_records, stored_prompts
from triptych.evaluation.lines import read_lines
from triptych.evaluation.metrics import Estimate
from triptych.evaluation.scores import Standing
from triptych.evaluation.verdicts import QUALITY
from triptych.images import replace

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1200px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8885; padding: .3rem .7rem; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.row { margin: 1.2rem 0; } .row > p { margin: .2rem 0; }
.quiet { color: #8a857a; font-size: .85rem; }
.pictures { display: flex; gap: .6rem; flex-wrap: wrap; }
figure { margin: 0; } figcaption { font-size: .8rem; color: #8a857a; max-width: 256px; }
img { width: 256px; max-width: 44vw; height: auto; display: block; background: #8882; }
"""


def page(title: str, body: str, style: str = STYLE) -> str:
    """A whole HTML document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def write_sheet(out: Path, found: Sequence[Standing]) -> Path:
    """Write OUT/index.html: the systems with speed and measures, then every prompt with all pictures."""
    study = read_json(out / "study.json")
    title = study["name"] or "Comparison"
    parts = [f"<h1>{escape(title)}</h1>", systems_table(found), *measure_tables(found)]
    parts += write_plots(out, found).values()
    parts += ["<h2>Pictures</h2>", *_rows(out)]
    path = out / "index.html"
    replace(path, page(title, "\n".join(parts)).encode())
    return path


def write_plots(folder: Path, found: Sequence[Standing]) -> dict[str, str]:
    """Write FOLDER/pareto.svg and, for every judge, FOLDER/pareto-NAME.svg; the plots by file name."""
    plots = {"pareto.svg": quality_plot(found)}
    for name in dict.fromkeys(name for one in found for name in one.scores):
        plots[f"pareto-{name}.svg"] = score_plot(found, name)
    plots = {file: plot for file, plot in plots.items() if plot}
    for file, plot in plots.items():
        replace(folder / file, (plot + "\n").encode())
    return plots


def systems_table(found: Sequence[Standing]) -> str:
    """Settings, seconds and memory of every system."""
    rows = [
        "<table><tr><th>system</th><th>settings</th><th>pictures</th><th>seconds a picture</th>"
        "<th>memory</th></tr>"
    ]
    for one in found:
        told = ", ".join(f"{key} {_plain(value)}" for key, value in one.settings.items() if key != "kind")
        memory = "" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.2f} GiB ({one.peak_of})"
        rows.append(
            f"<tr><td>{escape(one.name)}</td><td>{escape(told)}</td><td class=n>{one.pictures}</td>"
            f"<td class=n>{one.seconds:.3g}</td><td class=n>{memory}</td></tr>"
        )
    return "\n".join([*rows, "</table>"])


def measure_tables(found: Sequence[Standing]) -> list[str]:
    """What the judges say, for all prompts and by category; nothing when nothing was judged."""
    return [*_shares_tables([one for one in found if one.measures]), *_scores_table(found)]


def _shares_tables(judged: Sequence[Standing]) -> list[str]:
    if not judged:
        return []
    names = list(dict.fromkeys(name for one in judged for name in one.measures))
    categories = list(dict.fromkeys(name for one in judged for name in one.categories))
    head = "".join(f"<th>{escape(name)}</th>" for name in (*names, f"ahead of {judged[0].name}"))
    rows = [f"<h2>Judged automatically</h2>\n<table><tr><th>system</th>{head}</tr>"]
    for one in judged:
        cells = [_share(one.measures.get(name)) for name in names] + [difference(one.ahead)]
        rows.append(_row(one.name, cells))
    tables = ["\n".join([*rows, "</table>"])]
    if len(categories) > 1:
        head = "".join(f"<th>{escape(name)}</th>" for name in categories)
        rows = [f"<table><tr><th>{QUALITY}, by category</th>{head}</tr>"]
        rows += [_row(one.name, [_share(one.categories.get(c)) for c in categories]) for one in judged]
        tables.append("\n".join([*rows, "</table>"]))
    return tables


def _scores_table(found: Sequence[Standing]) -> list[str]:
    """Means of the judges' numbers, and how far each system is ahead of the first."""
    scored = [one for one in found if one.scores]
    if not scored:
        return []
    names = list(dict.fromkeys(name for one in scored for name in one.scores))
    first = scored[0].name
    head = "".join(f"<th>{escape(n)}</th><th>ahead of {escape(first)}</th>" for n in names)
    rows = [f"<h2>Judges' numbers</h2>\n<table><tr><th>system</th>{head}</tr>"]
    for one in scored:
        cells = []
        for name in names:
            cells += [mean(one.scores.get(name)), score_difference(one.scores_ahead.get(name))]
        rows.append(_row(one.name, cells))
    return ["\n".join([*rows, "</table>"])]


def mean(estimate: Estimate | None) -> str:
    """ "21.4 ± 0.3"; empty when there is nothing."""
    if estimate is None or estimate.count == 0:
        return ""
    return f"{estimate.value:.4g} ± {(estimate.high - estimate.low) / 2:.2g}"


def score_difference(ahead: Estimate | None) -> str:
    """ "+0.31 ± 0.12" in the judge's own unit; empty when there is nothing to compare with."""
    if ahead is None or ahead.count == 0:
        return ""
    return f"{ahead.value:+.3g} ± {(ahead.high - ahead.low) / 2:.2g}"


def difference(ahead: Estimate | None) -> str:
    """ "+3.1 ± 1.2" in points of a hundred; empty when there is nothing to compare with."""
    if ahead is None or ahead.count == 0:
        return ""
    return f"{100 * ahead.value:+.1f} ± {50 * (ahead.high - ahead.low):.1f}"


def quality_plot(found: Sequence[Standing]) -> str:
    """The Pareto plot, empty for fewer than two judged systems."""
    points = [Point(one.name, one.seconds, one.measures[QUALITY]) for one in found if QUALITY in one.measures]
    return pareto_plot("Quality and speed", points, f"share {QUALITY}") if len(points) > 1 else ""


def score_plot(found: Sequence[Standing], name: str) -> str:
    """The Pareto plot of one judge's mean, empty for fewer than two systems that it judged."""
    points = [
        Point(one.name, one.seconds, one.scores[name])
        for one in found
        if name in one.scores and one.scores[name].count
    ]
    return pareto_plot(f"{name} and speed", points, f"mean {name}", share=False) if len(points) > 1 else ""


def _rows(out: Path) -> list[str]:
    """One block per prompt, a line of pictures per seed."""
    prompts = stored_prompts(out)
    scores = {(row["system"], row["stem"]): row for row in read_lines(out / "scores.jsonl") if "stem" in row}
    records = [
        (record["index"], record["seed"], order, name, record)
        for order, name in enumerate(read_json(out / "study.json")["systems"])
        for record in read_records(name, out)
    ]
    records.sort(key=lambda found: found[:3])
    rows = []
    for index, together in groupby(records, key=lambda found: found[0]):
        prompt = prompts[index]
        kinds = " · ".join(filter(None, (str(index), prompt.source, prompt.category, prompt.challenge)))
        rows.append(
            f'<div class="row" id="p{index}"><p>{escape(prompt.prompt)}<br>'
            f'<span class="quiet">{escape(kinds)}</span></p>'
        )
        for _, line in groupby(together, key=lambda found: found[1]):
            figures = [_figure(name, r, scores.get((name, r["stem"]), {})) for *_, name, r in line]
            rows.append(f'<div class="pictures">{"".join(figures)}</div>')
        rows.append("</div>")
    return rows


def _figure(name: str, record: dict[str, Any], scores: dict[str, Any]) -> str:
    source = quote(f"pictures/{name}/{record['stem']}.png")
    width, height = record["size"]
    told = f"{name}, seed {record['seed']}"
    if scores.get(QUALITY) is not None:
        told += " · right" if scores[QUALITY] else " · not right"
    return (
        f'<figure><img src="{source}" width="{width}" height="{height}" loading="lazy" alt="{escape(name)}">'
        f"<figcaption>{escape(told)}</figcaption></figure>"
    )


def _row(name: str, cells: Sequence[str]) -> str:
    return f"<tr><td>{escape(name)}</td>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"


def _share(estimate: Estimate | None) -> str:
    if estimate is None or estimate.count == 0:
        return ""
    low, high = round(100 * estimate.low), round(100 * estimate.high)
    return f"{100 * estimate.value:.1f} % <span class=quiet>{low} to {high}</span>"


def _plain(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} values"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
