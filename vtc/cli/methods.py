# SPDX-License-Identifier: Apache-2.0
"""`vtc methods`: the compression methods, listed without importing PyTorch."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated

import typer

from .console import explain, output, stacked, wide_table
from .options import Import, Wide, fail


def methods(
    wide: Wide = False,
    imports: Import = [],  # noqa: B006
    model: Annotated[
        str | None,
        typer.Option(
            help="A model's id, folder or type (llava, qwen2_5_vl): which methods it takes, and "
            "why no others. Its weights are not loaded."
        ),
    ] = None,
) -> None:
    """List the compression methods: stages, settings with defaults, papers."""
    from vtc.cli.catalogue import catalogue

    if model is not None:
        _of_model(model)
        return
    console, rows = output(), []
    offered = bool(imports) or bool(entry_points(group="vtc.methods"))
    for entry in catalogue(live=offered):
        year = f" ({entry.year})" if entry.year else ""
        stages = ", ".join(entry.stages) + ", trained" * entry.trained
        reads, settings = ", ".join(entry.reads), ", ".join(entry.settings)
        rows.append((entry.name, entry.title, stages, reads, settings, f"{entry.paper}{year}"))
    if wide:
        wide_table(("method", "what it is", "stage", "reads", "settings", "paper"), rows)
    else:
        for name, title, stages, reads, settings, paper in rows:
            facts = [f"{title} {paper}".rstrip(), f"stage: {stages}" if stages else ""]
            facts += [f"reads: {reads}" if reads else "", f"settings: {settings}" * bool(settings)]
            stacked(console, name, filter(None, facts))
    explain(
        "As text: name, name:setting=value:setting=value, and 'first|second' to compose.",
        "keep is a fraction in (0, 1] of an image's tokens, or a whole number of tokens per image: "
        "1.0 keeps all, 1 keeps one.",
    )


def _of_model(model: str) -> None:
    """Print which methods a model takes."""
    import vtc
    from vtc.cli.support import skeleton

    try:
        found = skeleton(model)
        refused = vtc.refusals(found)
    except (OSError, ValueError, TypeError) as error:
        raise fail("--model", f"{model}: {error}") from None
    console = output()
    taken = [name for name in vtc.methods() if name not in refused]
    stacked(console, f"{type(found).__name__}", [f"takes {len(taken)}: {', '.join(taken)}"])
    for name, reason in refused.items():
        stacked(console, f"not {name}", [reason])
