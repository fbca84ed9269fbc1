"""The page that a report is: one file of HTML, with the script that draws its curves inside, which asks nothing of a network."""

import dataclasses
from pathlib import Path
from typing import Any

import jinja2

from utils import curves, published_results, result_labels, vega
from utils.past_run import Run, text_source

PAGES = Path(__file__).parent / "pages"


def of_run(run: Run) -> str:
    """The page of one run, as HTML."""
    record, results = run.record, run.results
    pictures = curves.pictures(run.log)
    state = "" if run.is_finished or not run.arguments else " · not finished"
    about = [run.script, record.get("finished"), *(record.get("environment", {}).get(k) for k in ("device",))]
    data = [("Source", text_source(run.arguments))] + result_labels.written(results, result_labels.DATA)
    tables: list[tuple[str, list[tuple[str, Any]]]] = [
        (
            "Results",
            [p for p in result_labels.written(results) if p not in result_labels.written(results, result_labels.DATA)],
        ),
        ("Text", data),
        ("Model", list(record.get("model", {}).items())),
        ("Environment", list(record.get("environment", {}).items())),
    ]
    return _render(
        "run.html",
        pictures,
        title=title(run),
        subtitle=" · ".join(str(part) for part in about if part) + state,
        tiles=result_labels.written(results, result_labels.TILES),
        samples=record.get("samples", []),
        sample_split=record.get("sample_split", "validation"),
        row=record.get("row"),
        row_headings=published_results.HEADINGS,
        published_rows=published_results.rows_of(run.arguments.get("model_name_or_path")),
        tables=[
            (heading, [(n, result_labels.plain(v)) for n, v in pairs if v is not None])
            for heading, pairs in tables
            if pairs
        ],
        command=record.get("command"),
        folder=record.get("folder"),
        yaml=record.get("yaml"),
        arguments=[(name, result_labels.plain(value)) for name, value in sorted(run.arguments.items())],
        footer=f"Output folder: {run.name}",
    )


def of_comparison(runs: list[Run]) -> str:
    """The page of several runs side by side, as HTML."""
    names = distinct_names(runs)
    rows = []
    for figure in result_labels.FIGURES:
        values = [run.results.get(figure.key) for run in runs]
        if any(isinstance(value, int | float) for value in values):
            cells = [figure.write(value) if isinstance(value, int | float) else "–" for value in values]
            rows.append((figure.label, cells, _best(values, figure.better)))
    differing = [
        (name, [result_labels.plain(value) for value in values], ())
        for name, values in differences([run.arguments for run in runs])
        if name != "output_dir"
    ]
    surroundings = [
        (name, [result_labels.plain(value) for value in values], ())
        for name, values in differences([run.record.get("environment", {}) for run in runs])
    ]
    tables: list[tuple[str, list, str]] = [
        ("Results", rows, "The best of each row is green." if len(rows) and len(runs) > 1 else "")
    ]
    tables.append(("Arguments that differ", differing, "" if differing else "None: the runs were asked for the same."))
    if surroundings:
        tables.append(("Environments that differ", surroundings, ""))
    return _render(
        "comparison.html",
        beside_one_another(runs, names),
        title=f"{len(runs)} runs compared",
        subtitle=" · ".join(names),
        names=names,
        tables=tables,
        footer="",
    )


def title(run: Run) -> str:
    """The model, as it was asked for."""
    name, kind = run.arguments.get("model_name_or_path"), run.arguments.get("model_type")
    return name or (f"{kind} from scratch" if kind else run.name)


def distinct_names(runs: list[Run]) -> list[str]:
    """The runs' names; those that several have are numbered."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def differences(mappings: list[dict]) -> list[tuple[str, list]]:
    """(name, its value in each) of what is not the same in all, by name."""
    everything = sorted(set().union(*mappings))
    values = {name: [mapping.get(name) for mapping in mappings] for name in everything}
    return [(name, found) for name, found in values.items() if any(value != found[0] for value in found)]


def beside_one_another(runs: list[Run], names: list[str]) -> list[curves.Picture]:
    """A picture for each figure of the logs, with a curve for each run that has it."""
    together: dict[str, curves.Picture] = {}
    for run, name in zip(runs, names, strict=True):
        for picture in curves.pictures(run.log):
            for curve in picture.curves:
                title = picture.title if len(picture.curves) == 1 else f"{picture.title}, {curve.name}"
                found = together.setdefault(title, dataclasses.replace(picture, title=title, curves=[]))
                found.curves.append(dataclasses.replace(curve, name=name))
    order = [title for title, *_ in curves.PICTURES]
    place = {title: index for index, title in enumerate(order)}
    return sorted(together.values(), key=lambda p: place.get(p.title.split(", ")[0], len(order)))


def _best(values: list, better: str) -> tuple[int, ...]:
    numbers = [value for value in values if isinstance(value, int | float)]
    if not better or len(numbers) < 2 or min(numbers) == max(numbers):
        return ()
    best = min(numbers) if better == "low" else max(numbers)
    return tuple(index for index, value in enumerate(values) if value == best)


def _render(page: str, pictures: list[curves.Picture], **named) -> str:
    script, why_not = None, ""
    if pictures:
        try:
            script = vega.script()
        except vega.NoVega as error:
            why_not = str(error)
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return pages.get_template(page).render(
        specifications=[curves.specification(picture) for picture in pictures],
        titles=[picture.title for picture in pictures],
        vega=script,
        why_not_drawn=why_not,
        **named,
    )
