# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes the embedded model under compression, and scores what that regains.

    python -m vtc.eval.embedded.training.finetune --out runs --cells divprune-lora plain-lora
    python -m vtc.eval.embedded.training.finetune --out runs --table > FINETUNE.md

A cell is what compresses during training (`plain`: nothing) and what is tuned; `none` tunes
nothing. All cells see the same scenes of the train split in the same order. Those that are trained
under compression are scored under it; `plain` and `none` under each method. Questions are those
of `vtc_scenes`, on the test split. A cell that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import vtc
from vtc.core import Method, make
from vtc.training.finetune import Config, finetune

from ...analysis.stats import holm, interval, paired
from ...tasks.parquet import task_questions
from ..score import Sample, answers, is_right
from ..vlm import embedded_path
from .atp import SceneBatches, load

METHODS = ("divprune", "visionzip")
PARTS: dict[str, dict[str, Any]] = {
    "projector": {"rate": 1e-3},
    "lora": {"rate": 2e-3, "lora_rank": 16, "lora_alpha": 32.0},
}
CELLS = ("none", *(f"{how}-{part}" for how in (*METHODS, "plain") for part in PARTS))
FIRST_SCENE = 20_000_000
"""First training scene; earlier ones have other uses."""


def judge(
    model: Any, processor: Any, samples: Sequence[Sample], method: Method | None
) -> list[bool]:
    """Whether the model answers each question right under `method`: greedy, exact match."""
    found: list[bool] = []
    with nullcontext() if method is None else vtc.patch(model, method):
        for start in range(0, len(samples), 16):
            chunk = samples[start : start + 16]
            given = answers(model, processor, chunk)
            found += [is_right(a, q.answer) for a, (q, _) in zip(given, chunk, strict=True)]
    return found


def run(
    cell: str, out: Path, keep: float, steps: int, size: int, samples: Sequence[Sample]
) -> None:
    """Train a cell and score it, unless that was done; writes `scores.json` to its folder.

    Args:
        cell: one of `CELLS`.
        out: folder of all cells.
        keep: fraction of the vision tokens to keep.
        steps: updates.
        size: scenes per update.
        samples: held-out questions with their pictures.
    """
    folder = out / cell
    if (folder / "scores.json").is_file():
        return
    model, processor = load(embedded_path())
    methods: dict[str, Method] = {name: make(name, keep=keep) for name in METHODS}
    how, _, part = cell.partition("-")
    since, seconds = time.monotonic(), 0.0
    if part:
        config = Config(out=folder, tune=part, steps=steps, save_every=10, **PARTS[part])
        batches = SceneBatches(processor, "train", size, FIRST_SCENE)
        finetune(model, methods.get(how), batches, config)
        seconds = time.monotonic() - since
    scored: list[str] = [how] if how in methods else [*methods]
    if not part:
        scored = ["full", *scored]
    model.eval()
    right = {name: judge(model, processor, samples, methods.get(name)) for name in scored}
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "keep": keep,
        "steps": steps if part else 0,
        "size": size,
        "seconds": round(seconds),
        "types": [question.type for question, _ in samples],
        "right": {name: [int(one) for one in ones] for name, ones in right.items()},
    }
    (folder / "scores.json").write_text(json.dumps(found) + "\n", "utf-8")


PAGE = """# Fine-tuning under compression on the embedded model

Written by `python -m vtc.eval.embedded.training.finetune`:

    python -m vtc.eval.embedded.training.finetune --out runs --keep {keep} --steps {steps} \\
    --batch {size} --questions {questions} --cells {cells}
    python -m vtc.eval.embedded.training.finetune --out runs --table > eval/embedded/FINETUNE.md

A cell is what compresses during training (`plain`: nothing; the control) and what is tuned:
`projector` (learning rate {projector[rate]:g}; with VisionZip its tuned variant) or `lora`
(adapters of rank {lora[lora_rank]} on the linear layers of the decoder, learning rate
{lora[rate]:g}). All else is frozen. AdamW in float32, seed 0, one run a cell: {steps} updates of
{size} scenes with a question each, the same for all cells ({scenes} scenes of the train split,
from number {first}). `none` is the model as it is. Scored are {questions} questions of
`vtc_scenes` (test split, seed 0), greedy, exact match. *Points regained* are against `none` under
the same method, on the same questions: standard error (SE) and 95 % interval (Agresti and Min)
are of the paired difference over questions, not over training runs; p is McNemar's, with Holm's
correction.

Two CPU cores, one thread a process, beside other work: minutes are wall-clock time, and say little
about cost.

"""


def page(out: Path) -> str:
    """`FINETUNE.md`, from the cells that are done, `none` among them."""
    done = [name for name in CELLS if (out / name / "scores.json").is_file()]
    found = {name: json.loads((out / name / "scores.json").read_text("utf-8")) for name in done}
    made = {(cell["keep"], cell["size"], len(cell["types"])) for cell in found.values()}
    steps = {cell["steps"] for name, cell in found.items() if name != "none"}
    if len(made) != 1 or len(steps) != 1:
        raise ValueError(f"out: the cells in {out} were made with different settings")
    (keep, size, questions), count = made.pop(), steps.pop()
    return PAGE.format(
        keep=keep, steps=count, size=size, questions=questions, cells=" ".join(done),
        scenes=count * size, first=FIRST_SCENE, **PARTS,
    ) + tables(out)  # fmt: skip


def tables(out: Path) -> str:
    """The tables of `FINETUNE.md`, from the cells that are done."""
    cells = {
        name: json.loads((out / name / "scores.json").read_text("utf-8"))
        for name in CELLS
        if (out / name / "scores.json").is_file()
    }
    none = cells["none"]
    full = none["right"]["full"]
    rows: list[tuple[str, str, list[int]]] = []
    for method in METHODS:
        for name, cell in cells.items():
            if method in cell["right"]:
                rows.append((method, name, cell["right"][method]))
    low, high = interval(full)
    lines = [
        f"All tokens, untuned: {_percent(full)} [{100 * low:.1f}, {100 * high:.1f}] of "
        f"{len(full)} questions.",
        "",
        "| scored under | trained under, what | right, % (SE) | points regained (SE) | 95 % | p |",
        "|---|---|---|---|---|---|",
    ]
    compared = {
        (method, name): paired(right, none["right"][method])
        for method, name, right in rows
        if name != "none"
    }
    corrected = dict(zip(compared, holm([one.p for one in compared.values()]), strict=True))
    for method, name, right in rows:
        line = f"| {method} | {name} | {_percent(right)} ({_error(right):.1f}) |"
        if (found := compared.get((method, name))) is None:
            lines.append(line + " - | - | - |")
            continue
        change = [a - b for a, b in zip(right, none["right"][method], strict=True)]
        a, b = found.interval
        lines.append(
            f"{line} {100 * found.difference:+.1f} ({_error(change):.1f}) | {100 * a:+.1f} to "
            f"{100 * b:+.1f} | {corrected[method, name]:.2g} |"
        )
    controls = {
        (method, part): paired(
            cells[f"{method}-{part}"]["right"][method], cells[f"plain-{part}"]["right"][method]
        )
        for method in METHODS
        for part in PARTS
        if f"{method}-{part}" in cells and f"plain-{part}" in cells
    }
    if controls:
        lines += [
            "",
            "| scored under | part | points of training under compression over plain | 95 % | p |",
            "|---|---|---|---|---|",
        ]
    ps = holm([one.p for one in controls.values()])
    for ((method, part), found), p in zip(controls.items(), ps, strict=True):
        a, b = found.interval
        lines.append(
            f"| {method} | {part} | {100 * found.difference:+.1f} | {100 * a:+.1f} to "
            f"{100 * b:+.1f} | {p:.2g} |"
        )
    kinds = sorted(set(none["types"]))
    lines += ["", "| scored under | trained under, what | " + " | ".join(kinds) + " |"]
    lines.append("|---|---|" + "---|" * len(kinds))
    for method, name, right in [("full", "none", full), *rows]:
        by_kind = [
            [one for one, its in zip(right, none["types"], strict=True) if its == kind]
            for kind in kinds
        ]
        lines.append(f"| {method} | {name} | " + " | ".join(map(_percent, by_kind)) + " |")
    return "\n".join([*lines, "", *_losses(out, cells)]) + "\n"


def _percent(right: Sequence[int]) -> str:
    return f"{100 * sum(right) / len(right):.1f}"


def _error(scores: Sequence[int]) -> float:
    """The standard error of the mean, in points."""
    return 100 * statistics.stdev(scores) / len(scores) ** 0.5


def _losses(out: Path, cells: dict[str, Any]) -> list[str]:
    """The mean loss by quarter of each cell's log, and its minutes."""
    lines = ["| trained under, what | loss by quarters of the run | minutes |", "|---|---|---|"]
    for name, cell in cells.items():
        if name == "none":
            continue
        log = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
        quarter = max(1, len(log) // 4)
        means = [
            sum(line["loss"] for line in log[i : i + quarter]) / quarter
            for i in range(0, 4 * quarter, quarter)
        ]
        shown = ", ".join(f"{mean:.3f}" for mean in means)
        lines.append(f"| {name} | {shown} | {cell['seconds'] / 60:.1f} |")
    return lines


def main() -> None:
    """Train and score cells, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the tables of finished cells")
    args = parser.parse_args()
    if args.table:
        print(page(args.out), end="")
        return
    torch.set_num_threads(args.threads)
    samples = list(task_questions("vtc_scenes", args.questions))
    for cell in args.cells:
        run(cell, args.out, args.keep, args.steps, args.batch, samples)


if __name__ == "__main__":
    main()
