# SPDX-License-Identifier: Apache-2.0
"""The rows of a run for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..report import runs as run_lengths
from .rows import at

if TYPE_CHECKING:
    from rich.console import RenderableType

_NOTE = """
prefill: the language model's, selection and vtc's overhead included, tower and projector not; \
medians of {repeats} turns, and half the distance of their quartiles. / all: over the unpatched \
model. / short: over the same model given the short sequence outright. beyond: the same without \
the layers before the first cut. / ideal: over what the FLOPs predict from the unpatched model. \
decode: one token a row. peak: beyond weights and inputs. Ratios are formed turn by turn."""


def table(results: Mapping[str, Any]) -> RenderableType:
    """The rows of `results` (what `run` returned), 120 columns wide at most."""
    from itertools import groupby

    from rich.console import Group
    from rich.text import Text

    machine, model = results["machine"], results["model"]
    where = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]
    load = machine["load_average"]["before"]
    busy = "" if load is None else f", load {load[0]} before"
    head = (
        f"{model['id']} · {model['layers']} layers, d = {model['hidden_size']}, "
        f"{model['weights']} weights · {where}, {machine['threads']} threads{busy}"
    )
    parts: list[RenderableType] = [Text(head, style="bold")]
    failed = []
    for (dtype, batch), group in groupby(results["rows"], key=lambda r: (r["dtype"], r["batch"])):
        rows = list(group)
        parts.append(_block(f"{dtype}, batch {batch}", rows))
        failed += [
            f"{dtype}, batch {batch}, {row['label']}: {row['error']}"
            for row in rows
            if row["status"] != "done"
        ]
    parts.append(Text(_NOTE.format(repeats=results["settings"]["repeats"]), style="dim"))
    parts += [Text(f"failed: {line}", style="red") for line in failed]
    return Group(*parts)


def _block(title: str, rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        pad_edge=False, show_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    drawn.add_column("\nmethod", overflow="fold", min_width=14)
    drawn.add_column("tokens ×\nlayers", overflow="fold", min_width=8)
    headers = "tower,\nms|prefill, ms\n± half IQR|selector,\nms|\n/ all|\n/ short|\nbeyond|"
    headers += "\n/ ideal|decode,\nms|\n/ short|peak,\nMiB"
    for header in headers.split("|"):
        drawn.add_column(header, justify="right", no_wrap=True)

    def ratio(row: Mapping[str, Any], *path: str) -> str:
        value = at(row, "ratio", *path, "median")
        return "–" if value is None else f"{value:.3f}"

    for row in rows:
        keep = "" if row["keep"] is None else f" {row['keep']:g}"
        if row["status"] != "done":
            drawn.add_row(f"{row['label']}{keep}", "", Text("failed", style="bold red"))
            continue
        ms, peak = row["ms"], row["peak_bytes"]
        middle, half = ms["prefill"]["median"], (ms["prefill"]["q3"] - ms["prefill"]["q1"]) / 2
        drawn.add_row(
            f"{row['label']}{keep}",
            run_lengths(row["tokens"]["per_layer"]),
            _ms(ms["vision"]["median"]),
            f"{_ms(middle)} ± {_ms(half)}",
            "–" if row["method"] is None else _ms(ms["selector"]["median"]),
            ratio(row, "unpatched", "prefill"),
            ratio(row, "short", "prefill"),
            ratio(row, "short", "beyond"),
            ratio(row, "ideal", "prefill"),
            _ms(ms["decode"]["median"]),
            ratio(row, "short", "decode"),
            "–" if peak is None else f"{peak / 2**20:.0f}",
        )
    return drawn


def _ms(value: float) -> str:
    """Milliseconds to about four digits."""
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"
