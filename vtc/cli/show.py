# SPDX-License-Identifier: Apache-2.0
"""`vtc show`: draw which tokens of an image survive."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .console import output
from .options import Import, fail, fail_of


def _check_picture(out: Path) -> None:
    """Refuse a file that no picture can be written to, before a model runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    accepted = FigureCanvasAgg.get_supported_filetypes()
    if out.suffix.lstrip(".").lower() not in accepted:
        kinds = ", ".join(f".{kind}" for kind in sorted(accepted))
        raise fail("--out", f"expected a file with one of the suffixes {kinds}, got {out}")
    if out.is_dir():
        raise fail("--out", f"{out} is a folder; name a file in it")
    if not out.parent.is_dir():
        raise fail("--out", f"no folder {out.parent}")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise fail("--out", f"{out}: no permission to write it")


def show(
    image: Annotated[Path, typer.Argument(help="The image.")],
    question: Annotated[str, typer.Option(help="The question for the model.")],
    method: Annotated[str, typer.Option(help="A method, optionally with settings.")] = "todre",
    keep: Annotated[
        str | None, typer.Option(help="Fraction or number of tokens. Default: the method's own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("kept.png"),
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id. Default: the model that comes with vtc."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 24,
    imports: Import = [],  # noqa: B006
) -> None:
    """Draw which tokens of an image survive, and print the answers with all and with these."""
    from importlib.util import find_spec

    import torch

    from vtc.core.spec import keep_is_at_fault, parse_keep, parse_method
    from vtc.viz.pictures import PictureError, open_picture

    if find_spec("matplotlib") is None:  # refused now, not after the model has run twice
        raise fail("vtc show", "needs pip install vision-token-compression[eval]")
    try:
        amount = None if keep is None else parse_keep(keep)
        chosen = parse_method(method, amount)
    except (ValueError, TypeError) as error:
        of_keep = keep is not None and keep_is_at_fault(error, method)
        raise fail_of("--keep" if of_keep else "--method", error) from None
    _check_picture(out)
    try:
        picture = open_picture(image)
    except PictureError as error:
        raise fail("IMAGE", str(error)) from None
    from vtc.eval.embedded.vlm import embedded_path
    from vtc.eval.harness.quiet import hub_answers, offline, without_bars
    from vtc.viz.trace import trace

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise fail("--device", f"{device}: {str(error).splitlines()[0]}") from None
    local = model is None or Path(model).is_dir()
    try:
        with offline(local or not hub_answers()), without_bars():
            folder = str(embedded_path()) if model is None else model
            found = trace(folder, picture, question, chosen, device, max_new_tokens)
    except OSError as error:
        raise fail("--model", f"{model}: {str(error).splitlines()[0]}") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise fail("--method", str(error).splitlines()[0]) from None
    from vtc.viz.plots import kept_views

    title = f"{method}{'' if keep is None else f', keep {keep}'}: {question}"
    figure = kept_views(found.views, title=title)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise fail("--out", f"{out}: {error}") from None
    console = output()
    if found.note is not None:
        console.print(found.note, style="yellow", soft_wrap=True)
    for name, count in found.counts.items():
        console.print(f"{name}: {count} of {found.total} tokens")
    console.print(f"all tokens: {found.answer_full!r}", markup=False)
    console.print(f"compressed: {found.answer!r}", markup=False)
    console.print(f"{out}", soft_wrap=True)
