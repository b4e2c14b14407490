"""Pictures of reports, as PNG: for each command that has one a function below. The only module to import matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench.reports.report import Report, Row, number

__all__ = ["draw"]

OURS = "#1f6f8b"
OTHERS = "#b8c4cc"
SERIES = ("#1f6f8b", "#e08e45", "#7a9e47", "#9a4f7d", "#555555", "#c2453c")


def draw(report: Report, out: Path) -> list[Path]:
    """Write the pictures of ``report`` into ``out``; returns their paths."""
    mpl.use("Agg")  # no display is needed, nor asked for
    painter = PAINTERS.get(report.command)
    if painter is None or not report.rows:
        return []
    with plt.style.context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        painter(report)
        path = out / f"{report.command}.png"
        plt.gcf().savefig(path, dpi=130, bbox_inches="tight")
        plt.close("all")
    return [path]


def throughput(report: Report) -> None:
    """A panel for each work-load, a bar for each contender."""
    found = rows_of(report, "pairs/s")
    workloads = distinct(found, "work")
    axes = panels(len(workloads), 3, 0.35 * len(distinct(found, "contender")) + 0.6)
    for axis, workload in zip(axes, workloads, strict=True):
        bars(axis, [row for row in found if row.of["work"] == workload], lambda row: row.of["contender"])
        axis.set_title(f"{workload}: pairs/s", loc="left", fontsize=8)


def latency(report: Report) -> None:
    """A panel for each table, a bar for each quantile."""
    shown = ("p50, ms", "p95, ms", "p99, ms", "ms")
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in report.rows:
        if row.measure in shown:
            tables.setdefault(tuple(row.of), []).append(row)
    axes = panels(len(tables), len(tables), 0.2 * max(map(len, tables.values())) + 0.6)
    for axis, (labels, rows) in zip(axes, tables.items(), strict=True):
        bars(axis, rows, lambda row: ", ".join(map(str, (*row.of.values(), row.measure.partition(",")[0]))))
        axis.set_title(f"{', '.join(labels)}: ms", loc="left")
        if max(row.median for row in rows) > 20 * min(row.median for row in rows):
            axis.set_xscale("log")


def scale(report: Report) -> None:
    """Efficiency and CPU time by number of slots; submit and dispatch by number of pending requests."""
    left, middle, right = panels(3, 3, 3)
    lines(left, rows_of(report, "efficiency, %"), "slots")
    left.set(title="the workers' time spent at work, %", ylim=(0, 105))
    lines(middle, rows_of(report, "CPU of the parent, µs a slice"), "slots")
    middle.set(title="CPU of the parent, µs a slice")
    middle.set_ylim(bottom=0)
    for i, measure in enumerate(("one more submit, µs", "dispatch and back, µs a request")):
        lines(right, rows_of(report, measure), "pending requests", measure, SERIES[i])
    right.set(title="µs a request")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)


def memory(report: Report) -> None:
    """Memory by phase, a panel for each measure. Lines: style by start method, colour by number of workers."""
    measures = [m for m in ("USS a worker, MiB", "PSS a worker, MiB", "RSS a worker, MiB") if rows_of(report, m)]
    axes = panels(len(measures), 3, 3.2)
    for axis, measure in zip(axes, measures, strict=True):
        found = rows_of(report, measure)
        counts, methods = distinct(found, "workers"), distinct(found, "start method")
        for backend in [name for name in distinct(found, "backend") if name != "none"]:
            for count in counts:
                for method in methods:
                    # The phases without a model are the same for all backends.
                    of = {"workers": count, "start method": method}
                    line = [r for r in found if of.items() <= r.of.items() and r.of["backend"] in ("none", backend)]
                    axis.plot(
                        [row.of["phase"] for row in line],
                        [row.median for row in line],
                        ("-", "--", ":")[methods.index(method)],
                        marker="o",
                        color=SERIES[counts.index(count) % len(SERIES)],
                        label=f"{backend}, {method}, {count} worker{'s' * (count > 1)}",
                    )
        axis.set(title=measure)
        axis.set_ylim(bottom=0)
        axis.tick_params(axis="x", rotation=30)
    axes[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def load(report: Report) -> None:
    """A panel for cached files and one for dropped ones, a bar for each step."""
    bars_in_panels(report, "s", "files", "step", "seconds, {}")


def start(report: Report) -> None:
    """As ``growth``; of one number of workers a panel for each measure, a bar for each start method."""
    if len({row.of.get("workers") for row in report.rows}) > 1:
        growth(report)
        return
    measures = list(dict.fromkeys(row.measure for row in report.rows))
    for axis, measure in zip(panels(len(measures), 3, 1.4), measures, strict=True):
        bars(axis, rows_of(report, measure), lambda row: row.of["start method"])
        axis.set_title(measure, loc="left")


def growth(report: Report) -> None:
    """A panel for each measure, a line for each start method, by the number of workers."""
    measures = list(dict.fromkeys(row.measure for row in report.rows))
    for axis, measure in zip(panels(len(measures), 3, 2.6), measures, strict=True):
        found = rows_of(report, measure)
        for color, method in zip(SERIES, distinct(found, "start method"), strict=False):
            lines(axis, [row for row in found if row.of["start method"] == method], "workers", method, color)
        axis.set(title=measure)
        axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=7)


def backends(report: Report) -> None:
    """A panel for each model, a bar for each backend and dtype."""
    bars_in_panels(report, "pairs/s", "model", "contender", "{}: pairs/s")


def models(report: Report) -> None:
    """A panel for each dtype, a bar for each model: times the lock."""
    bars_in_panels(report, "times the lock", "contender", "model", "{}: times the lock")


def prefix(report: Report) -> None:
    """By the length of a document, a line for each length in common: beside predict, and beside no sharing."""
    measures = ("times CrossEncoder.predict", "times not shared")
    for axis, measure in zip(panels(len(measures), 2, 3), measures, strict=True):
        found = rows_of(report, measure)
        for color, count in zip(SERIES, distinct(found, "tokens in common"), strict=False):
            of = [row for row in found if row.of["tokens in common"] == count]
            lines(axis, of, "tokens of a document", f"{count} tokens in common", color)
        axis.set(title=measure, yscale="log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axis.legend(frameon=False, fontsize=7)


def weights(report: Report) -> None:
    """All workers' memory by their number: a panel for each start method, a line for each setting of the weights."""
    found = rows_of(report, "PSS of all, MiB")
    methods = distinct(found, "start method")
    for axis, method in zip(panels(len(methods), 2, 3), methods, strict=True):
        for color, setting in zip(SERIES, distinct(found, "weights"), strict=False):
            of = {"start method": method, "weights": setting}
            lines(axis, [row for row in found if of.items() <= row.of.items()], "workers", setting, color)
        axis.set(title=f"{method}: PSS of all workers, MiB")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)


def reuse(report: Report) -> None:
    """A bar for each setting."""
    (axis,) = panels(1, 1, 1.6)
    bars(axis, rows_of(report, "pairs/s"), lambda row: row.of["reused"])
    axis.set_title("pairs/s, by what is reused", loc="left")


def cluster(report: Report) -> None:
    """Efficiency by number of seats; slices a second of many more, by the model and simulated."""
    left, right = panels(2, 2, 3)
    lines(left, rows_of(report, "efficiency, %"), "seats")
    left.set(title="the seats' time spent at work, %", ylim=(0, 105))
    for i, way in enumerate(("directly", "through the scheduler")):
        model, simulated = (
            [row for row in rows_of(report, f"slices/s, {how}") if row.of["slices go"] == way]
            for how in ("by the model", "simulated")
        )
        counts = [row.of["seats"] for row in model]
        right.plot(counts, [row.median for row in model], "--", color=SERIES[i], label=f"{way}: the model")
        right.plot(counts, [row.median for row in simulated], "o", color=SERIES[i], label=f"{way}: simulated")
    right.set(title="slices/s", xlabel="seats", xscale="log", yscale="log")
    right.legend(frameon=False, fontsize=7)


def serve(report: Report) -> None:
    """A panel for each load, a bar for each contender; and one of small requests beside a large one."""
    found = rows_of(report, "pairs/s")
    loads = list(dict.fromkeys((row.of["clients"], row.of["documents"]) for row in found))
    delays = [row for row in rows_of(report, "p99, ms") if "clients" not in row.of]
    axes = panels(len(loads) + bool(delays), 2, 1.5)
    for axis, (clients, documents) in zip(axes, loads, strict=False):
        of = {"clients": clients, "documents": documents}
        bars(axis, [row for row in found if of.items() <= row.of.items()], lambda row: row.of["contender"])
        axis.set_title(f"{clients} client{'s' * (clients > 1)}, {documents} documents: pairs/s", loc="left")
    if delays:
        bars(axes[-1], delays, lambda row: next(iter(row.of.values())))
        axes[-1].set_title(f"{next(iter(delays[0].of))}: p99, ms", loc="left")
        axes[-1].set_xscale("log")


PAINTERS: dict[str, Callable[[Report], None]] = {
    painter.__name__: painter
    for painter in (
        *(throughput, latency, scale, memory, load, start, growth, backends),
        *(models, prefix, weights, reuse, cluster, serve),
    )
}


def rows_of(report: Report, measure: str) -> list[Row]:
    """The rows of one measure."""
    return [row for row in report.rows if row.measure == measure]


def distinct(rows: Iterable[Row], label: str) -> list[Any]:
    """The different values of a label, in order."""
    return list(dict.fromkeys(row.of[label] for row in rows))


def panels(count: int, columns: int, height: float) -> list[Axes]:
    """``count`` axes, row by row, each ``height`` inches high."""
    columns = min(columns, count)
    lines = -(-count // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(5.2 * columns, height * lines), squeeze=False)
    axes: Sequence[Axes] = grid.flatten()
    for axis in axes[count:]:
        axis.remove()
    figure.set_layout_engine("constrained")
    return list(axes[:count])


def bars_in_panels(report: Report, measure: str, panel: str, bar: str, title: str) -> None:
    """One measure: a panel for each value of the label ``panel``, in it a bar for each value of ``bar``."""
    found = rows_of(report, measure)
    values = distinct(found, panel)
    for axis, value in zip(panels(len(values), 2, 0.3 * len(found) / len(values) + 0.6), values, strict=True):
        bars(axis, [row for row in found if row.of[panel] == value], lambda row: row.of[bar])
        axis.set_title(title.format(value), loc="left")


def bars(axis: Axes, rows: Sequence[Row], name: Callable[[Row], str]) -> None:
    """Horizontal bars with ranges and numbers; bars of mp_rerank are in colour."""
    names = [name(row) for row in rows]
    medians = [row.median for row in rows]
    ranges = [[row.median - row.low for row in rows], [row.high - row.median for row in rows]]
    colors = [OURS if any("mp_rerank" in str(value) for value in row.of.values()) else OTHERS for row in rows]
    axis.barh(range(len(rows)), medians, xerr=ranges, color=colors, error_kw={"lw": 0.8, "ecolor": "#444444"})
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    for i, row in enumerate(rows):
        axis.annotate(number(row.median), (row.high, i), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axis.margins(x=0.15)


def lines(axis: Axes, rows: Sequence[Row], along: str, label: str = "", color: str = OURS) -> None:
    """A line with its range; on the x axis, which is logarithmic, a label that is a number."""
    if not rows:  # not asked for
        return
    counts = [row.of[along] for row in rows]
    axis.fill_between(counts, [row.low for row in rows], [row.high for row in rows], alpha=0.2, color=color, lw=0)
    axis.plot(counts, [row.median for row in rows], marker="o", color=color, label=label)
    axis.set_xscale("log", base=2 if max(counts) < 1000 else 10)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel(along)
