# SPDX-License-Identifier: Apache-2.0
"""Figures: accuracy against tokens, and the kept tokens of an image. Needs matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vtc.core.errors import ArgumentError
from vtc.viz.pictures import as_rgb
from vtc.viz.views import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = ["figure_of", "kept_tokens", "kept_views", "token_axis", "tradeoff"]

# Okabe and Ito's palette, distinguishable for colour-blind readers; markers differ, too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREYS = {"random": ("#8C8C8C", "o"), "pool": ("#8C8C8C", "s"), "downsample": ("#8C8C8C", "^")}
"""The simple baselines, in grey so that the methods stand out."""


def figure_of(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("vtc.viz.plots needs matplotlib: pip install matplotlib") from error
    # Without pyplot: no global state, no window, nothing to close.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# ---- accuracy against tokens --------------------------------------------------------------------
def tradeoff(results: Mapping[str, Any]) -> Figure:
    """Plot accuracy against the vision tokens averaged over the layers, one line per method.

    The uncompressed and the blind model are horizontal lines. Bars and bands are 95 % intervals.

    Args:
        results: what `vtc.eval.harness.run.run` returns, or its results.json.

    Returns:
        A figure with one panel for each task; `figure.savefig("tradeoff.png")` writes it.

    Raises:
        ArgumentError: no finished cell with tokens to draw.
    """
    cells = [c for c in results["cells"] if c["status"] == "done" and c.get("tokens")]
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    if not tasks:
        raise ArgumentError("results", "no finished cell to draw")
    labels = list(dict.fromkeys(c["label"] for c in cells if c["label"] not in ("full", "blind")))
    styles = _styles(labels)
    across = min(len(tasks), 3)
    down = -(-len(tasks) // across)
    columns = 1 + (len(labels) - 1) // 16
    figure = figure_of(1.6 * columns + 5.0 * across, 3.8 * down)
    grid = figure.subplots(down, across, squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        _panel(axes, task, [c for c in cells if c["task"] == task], styles)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle[0])  # the line without its bars
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            ncols=columns,
            loc="outside right upper",
            frameon=False,
            fontsize=9,
        )
    return figure


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    n = 0
    for label in labels:
        if label in _GREYS:
            colour, marker = _GREYS[label]
            styles[label] = {"color": colour, "marker": marker, "linestyle": "--", "zorder": 2}
        else:
            colour = _COLOURS[n % len(_COLOURS)]
            marker = _MARKERS[(n + n // len(_COLOURS)) % len(_MARKERS)]
            styles[label] = {"color": colour, "marker": marker, "linestyle": "-", "zorder": 3}
            n += 1
    return styles


def _panel(
    axes: Axes,
    task: str,
    cells: Sequence[Mapping[str, Any]],
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    percent = 100.0 if all(c["interval"] is not None for c in cells) else 1.0
    right = max(c["tokens"]["equivalent"] for c in cells)
    for name, dashes, where in (("full", (0, ()), "bottom"), ("blind", (0, (1, 2)), "top")):
        found = next((c for c in cells if c["label"] == name and c["score"] is not None), None)
        if found is None:
            continue
        y = percent * found["score"]
        axes.axhline(y, color="#404040", linewidth=1.2, linestyle=dashes, zorder=1)
        if found["interval"] is not None:
            low, high = (percent * v for v in found["interval"])
            axes.axhspan(low, high, color="#404040", alpha=0.07, linewidth=0, zorder=0)
        tokens = f" ({found['tokens']['equivalent']:.0f} tokens)" if name == "full" else ""
        axes.annotate(
            f"{name}{tokens}", (1.0, y), xycoords=("axes fraction", "data"),
            xytext=(-4, 3 if where == "bottom" else -3), textcoords="offset points",
            ha="right", va=where, fontsize=8.5, color="#404040",
        )  # fmt: skip
    drawn = [c for c in cells if c["label"] in styles and c["score"] is not None]
    order = {label: i for i, label in enumerate(styles)}
    drawn.sort(key=lambda c: (c["tokens"]["equivalent"], order[c["label"]]))
    tokens_of = [c["tokens"]["equivalent"] for c in drawn]
    place = {id(c): x for c, x in zip(drawn, side_by_side(tokens_of, right), strict=True)}
    for label, style in styles.items():
        line = [c for c in drawn if c["label"] == label]
        if not line:
            continue
        x = [place[id(c)] for c in line]
        y = [percent * c["score"] for c in line]
        bars = None
        if all(c["interval"] is not None for c in line):
            bars = [
                [percent * (c["score"] - c["interval"][0]) for c in line],
                [percent * (c["interval"][1] - c["score"]) for c in line],
            ]
        axes.errorbar(
            x, y, yerr=bars, label=label, linewidth=1.5, markersize=5.5, elinewidth=0.8,
            capsize=2.5, **style,
        )  # fmt: skip
    token_axis(axes, [c["tokens"]["equivalent"] for c in cells if c["label"] in styles], right)
    moved = any(abs(place[id(c)] / c["tokens"]["equivalent"] - 1) > 0.001 for c in drawn)
    note = "\n(overlapping points are drawn side by side)" if moved else ""
    axes.set_xlabel(f"vision tokens of an image, mean over the layers{note}", fontsize=9.5)
    metric = next((c["metric"] for c in cells), "score")
    axes.set_ylabel("accuracy, %" if percent == 100.0 else metric)
    axes.set_title(task, loc="left", fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


_APART = 0.024
"""Distance between the bars of neighbours, as a fraction of the axis: the width of a marker."""
_MOST = 0.3
"""Largest extent of a group of neighbours, in halvings; larger groups are drawn closer."""


def side_by_side(tokens: Sequence[float], right: float) -> list[float]:
    """Spread points with nearly equal token counts, so that their bars do not overlap: evenly
    around their mean on the logarithmic axis of `token_axis`, in order.

    Args:
        tokens: token counts, ascending.
        right: the end of the axis, in tokens.

    Returns:
        Where to draw each point, in tokens.
    """
    if not tokens:
        return []
    logs = [math.log2(n) for n in tokens]
    apart = _APART * (math.log2(right) - logs[0] + 0.5)

    def spread(group: Sequence[float]) -> list[float]:
        step = min(apart, _MOST / max(len(group) - 1, 1))
        middle = sum(group) / len(group)
        return [middle + (i - (len(group) - 1) / 2) * step for i in range(len(group))]

    groups: list[list[float]] = []
    for log in logs:
        groups.append([log])
        # A larger group may overlap the previous one.
        while len(groups) > 1 and spread(groups[-1])[0] - spread(groups[-2])[-1] < apart - 1e-9:
            last = groups.pop()
            groups[-1] += last
    return [2.0**log for group in groups for log in spread(group)]


def token_axis(axes: Axes, tokens: Sequence[float], right: float) -> None:
    """Set a logarithmic token axis with plain numbers, on which each halving is one step.

    Args:
        axes: the axes.
        tokens: token counts to cover.
        right: the right end of the axis, in tokens.
    """
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    low = min(tokens, default=right / 2)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.3, right * 1.12)
    ticks = [right]
    while ticks[-1] / 2 >= low / 1.3:
        ticks.append(ticks[-1] / 2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


# ---- kept tokens --------------------------------------------------------------------------------
def kept_tokens(
    image: Image.Image,
    grid: tuple[int, int],
    kept: Sequence[int] | Mapping[str, Sequence[int]],
    *,
    title: str | None = None,
) -> Figure:
    """Draw the kept tokens of an image on it.

    Args:
        image: the picture that the model saw.
        grid: (rows, columns) of the image's tokens.
        kept: row-major numbers of the tokens kept; or several such lists by name ("before layer
            2", ...), one panel each.
        title: title of the figure.

    Returns:
        A figure with the image and one panel per list.

    Raises:
        ArgumentError: a token outside the grid, or nothing to draw.
    """
    panels = dict(kept) if isinstance(kept, Mapping) else {"": kept}
    cells = list(range(grid[0] * grid[1]))
    view = View("image", image, grid, cells, {name: list(left) for name, left in panels.items()})
    return kept_views([view], title=title)


def kept_views(views: Sequence[View], *, title: str | None = None) -> Figure:
    """Draw the kept tokens on their pictures, each with one panel per stage.

    Args:
        views: views of one image with the same stages, as in `vtc.viz.trace.Trace`.
        title: title of the figure.

    Returns:
        A figure with one block of panels per view.

    Raises:
        ArgumentError: a token outside a grid, or nothing to draw.
    """
    if not views or not views[0].kept:
        raise ArgumentError("kept", "expected at least one list of tokens, got none")
    masks = [{stage: _mask(view, left) for stage, left in view.kept.items()} for view in views]
    total = 1 + len(masks[0])
    across = min(total, 4)
    down = -(-total // across)
    # Wide and tall planes of tiles fill their panels; the panels of a row have one shape.
    heights = [3.1 * min(max(v.image.height / v.image.width, 0.2), 2.5) for v in views]
    lines = textwrap.wrap(title or "", 42 * across)
    room = sum((height + 0.35) * down for height in heights)
    figure = figure_of(3.1 * across, room + 0.25 * len(lines))
    axes = figure.subplots(
        down * len(views),
        across,
        squeeze=False,
        height_ratios=[height for height in heights for _ in range(down)],
    )
    for i, (view, own) in enumerate(zip(views, masks, strict=True)):
        panels = list(axes[i * down : (i + 1) * down].flat)
        for n, ax in enumerate(panels):
            ax.set_visible(n < total)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(color="#B0B0B0", linewidth=0.6)
        shown = as_rgb(view.image)
        panels[0].imshow(shown)
        panels[0].set_title(view.name, fontsize=9, loc="left")
        for ax, (stage, mask) in zip(panels[1:], own.items(), strict=False):
            ax.imshow(_faded(shown, mask))
            _outline(ax, mask, shown.width, shown.height)
            count = f"{int(mask.sum())} of {len(view.cells)} tokens"
            ax.set_title(f"{stage}: {count}" if stage else count, fontsize=9, loc="left")
    if lines:
        figure.suptitle("\n".join(lines), fontsize=10, x=0.01, ha="left")
    return figure


def _mask(view: View, left: Sequence[int]) -> np.ndarray:
    """(rows, columns) bool, True at cells with kept tokens."""
    rows, columns = view.grid
    chosen = np.asarray(list(left), dtype=int)
    if chosen.size and not (chosen.min() >= 0 and chosen.max() < rows * columns):
        raise ArgumentError(
            "kept",
            f"a grid of {rows} x {columns} has tokens 0 to {rows * columns - 1}, got "
            f"{chosen.min()} to {chosen.max()}",
        )
    mask = np.zeros((rows, columns), dtype=bool)
    mask.flat[chosen] = True
    return mask


def _faded(image: Image.Image, mask: np.ndarray) -> np.ndarray:
    """(h, w, 3) the image with the cells outside `mask` darkened."""
    pixels = np.asarray(image, dtype=np.float32)
    h, w = pixels.shape[:2]
    rows, columns = mask.shape
    y, x = np.arange(h) * rows // h, np.arange(w) * columns // w
    keep = mask[y][:, x][..., None]
    dark = np.array([38.0, 42.0, 51.0], dtype=np.float32)
    return np.where(keep, pixels, 0.22 * pixels + 0.78 * dark).astype(np.uint8)


def _outline(axes: Axes, mask: np.ndarray, width: int, height: int) -> None:
    """Outline kept cells, for dark pictures."""
    from matplotlib.collections import LineCollection

    rows, columns = mask.shape
    padded = np.pad(mask, 1)
    lines = []
    for r, c in zip(*np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1]), strict=True):
        lines.append([(c, r), (c + 1, r)])
    for r, c in zip(*np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1]), strict=True):
        lines.append([(c, r), (c, r + 1)])
    scale = np.array([width / columns, height / rows])
    placed = [np.asarray(line) * scale - 0.5 for line in lines]
    axes.add_collection(LineCollection(placed, colors="#F0E442", linewidths=0.6))
