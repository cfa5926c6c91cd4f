# SPDX-License-Identifier: Apache-2.0
"""The results of `vtc bench` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..report.table import FULL_WIDTH, named
from ..report.table import runs as run_lengths
from .rows import at

if TYPE_CHECKING:
    from rich.console import RenderableType

_NOTE = """
prefill: the language model's, with selection and vtc's overhead, without tower and projector; \
medians of {repeats} rounds{spread}. / all: relative to the unpatched model. / short: relative to \
the plain model with equally many tokens. {more}decode: one token per row. peak: memory beyond \
weights and inputs. Ratios are computed round by round."""
_SPREAD = ", ± half their interquartile range"
_MORE = """\
beyond: the same without the layers before the first cut. / ideal: relative to the unpatched \
model's time, scaled by FLOPs. """
_WITHOUT = """
With --wide: the tower's time, the spread of prefills, decoding in ms, and the ratios "beyond" \
(without the layers before the first cut) and "/ ideal" (relative to what the FLOPs predict)."""


def table(results: Mapping[str, Any], width: int | None = None) -> RenderableType:
    """The results as tables, with their head and notes.

    Args:
        results: what `vtc.eval.bench.runner.run` returned.
        width: columns of the terminal; below `FULL_WIDTH` the tables have fewer columns, to fit 80.
            `None` shows all, in at most 120.
    """
    from rich.console import Group

    return Group(head(results), *blocks(results, width), notes(results, width))


def head(results: Mapping[str, Any]) -> RenderableType:
    """The model and the machine."""
    from rich.text import Text

    machine, model = results["machine"], results["model"]
    where = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]
    load = machine["load_average"]["before"]
    busy = "" if load is None else f", load {load[0]} before"
    return Text(
        f"{model['id']} · {model['layers']} layers, d = {model['hidden_size']}, "
        f"{model['weights']} weights · {where}, {machine['threads']} threads{busy}",
        style="bold",
    )


def blocks(results: Mapping[str, Any], width: int | None = None) -> Iterator[RenderableType]:
    """One table per precision and batch size."""
    from itertools import groupby

    narrow = _narrow(width)
    for (dtype, batch), group in groupby(results["rows"], key=lambda r: (r["dtype"], r["batch"])):
        yield _block(f"{dtype}, batch {batch}", list(group), narrow)


def _narrow(width: int | None) -> bool:
    return width is not None and width < FULL_WIDTH


def notes(results: Mapping[str, Any], width: int | None = None) -> RenderableType:
    """Explanations of the tables' columns at this width, and the errors of failed variants."""
    from rich.console import Group
    from rich.text import Text

    failed = [
        f"{row['dtype']}, batch {row['batch']}, {row['label']}: {row['error']}"
        for row in results["rows"]
        if row["status"] != "done"
    ]
    repeats = results["settings"]["repeats"]
    if _narrow(width):
        said = _NOTE.format(repeats=repeats, spread="", more="") + _WITHOUT
    else:
        said = _NOTE.format(repeats=repeats, spread=_SPREAD, more=_MORE)
    return Group(
        Text(said, style="dim"),
        *(Text(f"failed: {line}", style="red") for line in failed),
    )


def _block(title: str, rows: Sequence[Mapping[str, Any]], narrow: bool) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        pad_edge=False, show_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    drawn.add_column("\nmethod", overflow="fold", min_width=14, max_width=18 if narrow else None)
    drawn.add_column("tokens ×\nlayers", overflow="fold", min_width=8)
    headers = "tower,\nms|prefill, ms\n± half IQR|selector,\nms|\n/ all|\n/ short|\nbeyond|"
    headers += "\n/ ideal|decode,\nms|\n/ short|peak,\nMiB"
    # The main figures; the others are their parts.
    chosen = (1, 2, 3, 4, 8, 9) if narrow else tuple(range(10))
    for number, header in enumerate(headers.split("|")):
        if number in chosen:
            text = "decode\n/ short" if narrow and number == 8 else header
            text = "prefill,\nms" if narrow and number == 1 else text
            drawn.add_column(text, justify="right", no_wrap=True)

    def ratio(row: Mapping[str, Any], *path: str) -> str:
        value = at(row, "ratio", *path, "median")
        return "–" if value is None else f"{value:.3f}"

    for row in rows:
        keep = "" if row["keep"] is None else f" {row['keep']:g}"
        name = (named(row["label"], 18 - len(keep)) if narrow else row["label"]) + keep
        if row["status"] != "done":
            drawn.add_row(name, "", Text("failed", style="bold red"))
            continue
        ms, peak = row["ms"], row["peak_bytes"]
        middle, half = ms["prefill"]["median"], (ms["prefill"]["q3"] - ms["prefill"]["q1"]) / 2
        figures = (
            _ms(ms["vision"]["median"]),
            _ms(middle) if narrow else f"{_ms(middle)} ± {_ms(half)}",
            "–" if row["method"] is None else _ms(ms["selector"]["median"]),
            ratio(row, "unpatched", "prefill"),
            ratio(row, "short", "prefill"),
            ratio(row, "short", "beyond"),
            ratio(row, "ideal", "prefill"),
            _ms(ms["decode"]["median"]),
            ratio(row, "short", "decode"),
            "–" if peak is None else f"{peak / 2**20:.0f}",
        )
        lengths = run_lengths(row["tokens"]["per_layer"])
        drawn.add_row(
            name, lengths.replace(" ", "\n") if narrow else lengths, *(figures[i] for i in chosen)
        )
    return drawn


def _ms(value: float) -> str:
    """Milliseconds to about four digits."""
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"
