"""A run's log as curves: which figures belong in one picture, thinned out, as Vega-Lite specifications.

Vega-Lite is a grammar of pictures in JSON (https://vega.github.io/vega-lite/). Nothing is drawn here.
"""

import csv
import io
import math
from dataclasses import dataclass

import numpy as np

POINTS = 300  # of a curve, at most: about as many as a picture can tell apart
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # its name; nobody fetches it


@dataclass(frozen=True)
class Curve:
    """One figure over the steps. All of shape (points,), finite.

    steps: ascending. values: at those steps or, of a curve that was thinned out, the means around them; low, high: the
    least and the largest value there.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Picture:
    """Curves that share their axes. form: how d3-format writes the values. log: the values' axis is logarithmic."""

    title: str
    curves: list[Curve]
    form: str = ",.4~g"
    log: bool = False


# Title, {key of the log: name of the curve}, form, log axis, factor.
PICTURES: list[tuple[str, dict[str, str], str, bool, float]] = [
    ("Loss (nats per token)", {"loss": "training", "eval_loss": "evaluation"}, ".4f", False, 1),
    ("Perplexity", {"perplexity": "training", "eval_perplexity": "evaluation"}, ",.4~g", True, 1),
    ("Accuracy", {"eval_accuracy": "evaluation"}, ".2%", False, 1),
    ("Learning rate", {"learning_rate": "learning rate"}, ".3~g", False, 1),
    ("Gradient norm", {"grad_norm": "gradient norm"}, ",.4~g", False, 1),
    ("Loss scale", {"loss_scale": "loss scale"}, ",.6~g", False, 1),
    ("Skipped steps (total)", {"skipped_steps": "skipped steps"}, ",d", False, 1),
    ("Tokens per second", {"tokens_per_second": "tokens per second"}, ",.4~g", False, 1),
    ("Model FLOPs utilization", {"mfu": "MFU"}, ".1%", False, 1),
    (
        "Share of the time",
        {"data_wait": "waiting for data", "optimizer_share": "optimizer"},
        ".1%",
        False,
        1,
    ),
    (
        "Memory (GiB)",
        {"peak_memory_bytes": "peak", "train_peak_memory_bytes": "peak", "memory_bytes": "in use"},
        ",.3~f",
        False,
        2**-30,
    ),
]
# What is no figure of training, or is told elsewhere.
NO_CURVE = {"step", "epoch", "total_flos", "train_loss", "fps"}
NO_CURVE_ENDINGS = ("_runtime", "_per_second", "_samples")


def pictures(log: list[dict]) -> list[Picture]:
    """The pictures that a log has figures for.

    log: trainer_state.json's log_history. Figures that are known get their place; others get a picture each, after them.
    """
    log = [_with_perplexity(entry) for entry in log]
    drawn = []
    known: set[str] = set(NO_CURVE)
    for title, names, form, is_log, factor in PICTURES:
        known |= names.keys()
        curves = [found for key, name in names.items() if (found := curve(log, key, name, factor)) is not None]
        if curves and not _is_dull(title, curves):
            told = f"{title}, {curves[0].name}" if len(curves) == 1 < len(set(names.values())) else title
            drawn.append(Picture(told, curves, form, is_log))
    others = {key for entry in log for key, value in entry.items() if _is_number(value)} - known
    for key in sorted(key for key in others if not key.endswith(NO_CURVE_ENDINGS)):
        if (found := curve(log, key, key.replace("_", " "))) is not None:
            drawn.append(Picture(key.replace("_", " ").capitalize(), [found]))
    return drawn


def _with_perplexity(entry: dict) -> dict:
    added = {}
    for loss, name in (("loss", "perplexity"), ("eval_loss", "eval_perplexity")):
        if _is_number(entry.get(loss)) and entry[loss] < 100:
            added[name] = math.exp(entry[loss])
    return {**added, **entry}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_dull(title: str, curves: list[Curve]) -> bool:
    """A loss scale that never moves is told in the table of arguments; a picture of it would say nothing."""
    return (
        title in ("Loss scale", "Skipped steps (total)")
        and all(np.ptp(c.values) == 0 for c in curves)
        and (curves[0].values[0] in (0, 1))
    )


def curve(log: list[dict], key: str, name: str, factor: float = 1) -> Curve | None:
    """The values of a key over the steps, of a step that is logged twice the later one; None if there is no value."""
    found = {entry["step"]: entry[key] * factor for entry in log if "step" in entry and _is_number(entry.get(key))}
    if not found:
        return None
    steps = np.array(sorted(found), dtype=np.int64)
    values = np.array([found[step] for step in steps.tolist()], dtype=np.float64)
    return Curve(name, *thin_out(steps, values))


def thin_out(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, ...]:
    """steps, values, low and high of a Curve with at most `points`: of equal parts the means, and the ends of their range,
    so that no spike is lost."""
    if len(steps) <= points:
        return steps, values, values, values
    begins = np.linspace(0, len(steps), points, endpoint=False).astype(np.int64)
    counts = np.diff([*begins, len(steps)])
    means = np.add.reduceat(values, begins) / counts
    return (
        steps[begins + counts // 2],
        means,
        np.minimum.reduceat(values, begins),
        np.maximum.reduceat(values, begins),
    )


def specification(picture: Picture) -> dict:
    """The picture in Vega-Lite: lines, and the value of the nearest point on hover. Colours are the page's variables."""
    names = [line.name for line in picture.curves]
    few = max(len(line.steps) for line in picture.curves) <= 30
    colours = {"domain": names, "range": [f"var(--curve-{1 + index % 8})" for index in range(len(names))]}
    low, high = min(line.low.min() for line in picture.curves), max(line.high.max() for line in picture.curves)
    last = max(int(line.steps[-1]) for line in picture.curves)
    has_range = any(np.any(line.low < line.high) for line in picture.curves)
    band = {
        "mark": {"type": "area", "opacity": 0.22, "tooltip": None, "clip": True},
        "encoding": {"y": {"field": "l", "type": "quantitative"}, "y2": {"field": "h"}},
    }
    is_log = picture.log and low > 0 and high > 20 * low
    scale = {"type": "log", "nice": False} if is_log else {"zero": False, "nice": True}
    if low == high:
        scale = {"zero": True}
    return {
        "$schema": SCHEMA,
        "description": f"{picture.title} over {last} steps: {', '.join(names)}",
        "width": "container",
        "height": 210,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": _table(picture.curves, has_range), "format": {"type": "csv", "parse": dict.fromkeys("svlh", "number")}},
        "encoding": {
            "x": {"field": "s", "type": "quantitative", "title": None, "scale": {"nice": False}, "axis": _steps_axis(last)},
            "y": {
                "field": "v",
                "type": "quantitative",
                "title": None,
                "scale": scale,
                "axis": {"format": _axis_form(picture.form, high), "tickCount": 5}
                | ({"values": _decades(low, high)} if is_log else {}),
            },
            "color": {
                "field": "n",
                "type": "nominal",
                "scale": colours,
                "legend": {"orient": "top", "title": None} if len(names) > 1 else None,
            },
            "tooltip": [
                {"field": "n", "type": "nominal", "title": "curve"},
                {"field": "s", "type": "quantitative", "title": "step", "format": ",d"},
                {"field": "v", "type": "quantitative", "title": "value", "format": picture.form},
            ],
        },
        "layer": [
            *([band] if has_range else []),
            {"mark": {"type": "line", "strokeWidth": 1.75, "strokeJoin": "round", "tooltip": None, "clip": True}},
            {
                "params": [
                    {"name": "near", "select": {"type": "point", "nearest": True, "on": "pointerover", "clear": "pointerout"}}
                ],
                "mark": {"type": "point", "filled": True, "size": 60 if not few else 36, "aria": False},
                "encoding": {
                    "opacity": {
                        "condition": {"param": "near", "empty": False, "value": 1},
                        "value": 0.85 if few else 0,
                    },
                },
            },
        ],
        "config": CONFIG,
    }  # fmt: skip


def _table(lines: list[Curve], has_range: bool) -> str:
    """step, curve, value and its range of each point as CSV, a third of what they take in JSON."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow("snvlh" if has_range else "snv")
    for line in lines:
        columns = (line.values, line.low, line.high) if has_range else (line.values,)
        for step, *values in zip(line.steps.tolist(), *columns, strict=True):
            rows.writerow([step, line.name, *(f"{value:.5g}" for value in values)])
    return text.getvalue()


def _axis_form(form: str, high: float) -> str:
    if "%" in form:
        return "~%"
    return ".4~s" if high >= 1000 else ".4~g"


def _steps_axis(last: int) -> dict:
    return {
        "format": ",d" if last < 10000 else "~s",
        "tickCount": 6,
        "labelOverlap": True,
        "labelSeparation": 10,
        "grid": False,
    }


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from low to high: Vega itself draws a line for each of 1 to 9."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        value for power in powers for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= value <= high
    ]


CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--quiet)",
        "labelFontSize": 11,
        "gridColor": "var(--rule)",
        "domainColor": "var(--rule)",
        "tickColor": "var(--rule)",
        "domain": False,
        "ticks": False,
        "labelPadding": 6,
    },
    "legend": {
        "labelColor": "var(--text)",
        "labelFontSize": 12,
        "symbolType": "stroke",
        "symbolStrokeWidth": 3,
        "symbolOpacity": 1,
        "padding": 0,
        "offset": 6,
    },
}
