# SPDX-License-Identifier: Apache-2.0
"""`vtc bench`: the time methods cost and save."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import output
from .options import Import, WideTable, budgets, fail, listed
from .progress import bar, observer, stopped


def bench(
    config: Annotated[
        str, typer.Option(help="speed-bar, llava-1.5-7b, ..., a folder or a hub id.")
    ] = "speed-bar",
    layers: Annotated[int | None, typer.Option(help="Decoder layers. Default: all.")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Use the checkpoint's weights, not random ones.")
    ] = False,
    methods: Annotated[
        str, typer.Option(help="Methods, comma-separated: todre,fastv:layer=3.")
    ] = "todre,divprune,visionzip,fastv",
    keep: Annotated[
        str, typer.Option(help="Fractions or numbers of tokens per image, comma-separated.")
    ] = "0.1",
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated: 1,4,8.")] = "1",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, comma-separated.")
    ] = "float32",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if there is one.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Height x width in pixels: 672x840.")] = None,
    text: Annotated[int, typer.Option(help="Text tokens in the prompt.")] = 64,
    decode: Annotated[int, typer.Option(help="New tokens after each prefill.")] = 8,
    unpatched: Annotated[
        bool, typer.Option(help="Also run the plain model on all tokens, the slowest part.")
    ] = True,
    warmup: Annotated[int, typer.Option(help="Warm-up rounds, which do not count.", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="Measured rounds.", min=2)] = 7,
    threads: Annotated[int | None, typer.Option(help="PyTorch threads on a CPU.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, inputs and sampling methods.")] = 0,
    imports: Import = [],  # noqa: B006
    wide: WideTable = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.csv.")] = Path(
        "results/bench"
    ),
) -> None:
    """Measure prefill, selection, decoding and peak memory against the plain model.

    Also compares every method with the plain model given the short sequence directly. Exit code 1
    if a measurement failed, 2 if an argument is invalid.
    """
    from vtc.eval import bench as timing
    from vtc.eval.harness.run import BadInput

    keeps, names = budgets(keep), listed("--methods", methods)
    try:
        batches = tuple(map(int, listed("--batch", batch)))
    except ValueError:
        raise fail("--batch", f"expected whole numbers, got {batch!r}") from None
    size = None
    if image is not None:
        height, cross, width = image.partition("x")
        if not (cross and height.isdecimal() and width.isdecimal()):
            raise fail("--image", f"expected height x width such as 672x840, got {image!r}")
        size = int(height), int(width)
    settings = timing.Settings(
        config=config, layers=layers, pretrained=pretrained, methods=names, keeps=keeps,
        batches=batches, dtypes=listed("--dtype", dtype), device=device, image=size, text=text,
        decode=decode, unpatched=unpatched, warmup=warmup, repeats=repeats, threads=threads,
        seed=seed, out=out,
    )  # fmt: skip
    started = time.perf_counter()
    console = output(wide)
    room = None if wide else console.width
    shown: list[int] = []

    def show_rows(found: Mapping[str, Any]) -> None:
        if not shown:
            console.print(timing.head(found))
        shown.append(len(found["rows"]))
        for block in timing.blocks(found, room):
            console.print(block)

    try:
        with bar() as progress:
            results = timing.run(settings, observer(progress, show_rows))
    except BadInput as error:
        raise fail(error.option, error.message) from None
    except KeyboardInterrupt:
        kept = f"{sum(shown)} rows are kept in {out}/bench.json" if shown else "nothing is kept"
        stopped(f"stopped: {kept}; rows of a precision and batch size are measured together")
    console.print(timing.notes(results, room))
    seconds = time.perf_counter() - started
    console.print(f"\n{out}: bench.json, bench.csv ({seconds:.0f} s)", soft_wrap=True)
    if any(row["status"] != "done" for row in results["rows"]):
        raise typer.Exit(1)
