# SPDX-License-Identifier: Apache-2.0
"""How long the shared functions of `vtc.ops` take, beside the ways they could go and their twins.

    python -m vtc.eval.bench_ops                  288 of 2880 tokens at d = 1024
    python -m vtc.eval.bench_ops --n 576 --k 58 --d 4096 --threads 1

A selector that compares tokens can work in steps, with one product of a row and all tokens for each
choice, or make all pairs at once. Both are timed here, with the library's own function, in turns in
one process; `ratio` is the library's time over that of the better way. The naive twins loop in
Python and are timed with a tenth of the tokens, against the library with as many.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from unittest import mock

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vtc import ops
from vtc.ops import greedy, naive, unit_rows

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One function: how it is called, the ways there are, and its twin; on n, k tokens each."""

    name: str
    ours: Callable[[Tensor, int], object]
    ways: dict[str, Callable[[Tensor, int], object]]
    twin: Callable[[Tensor, int], object]


def _forced(
    function: Callable[[Tensor, int], object], pairs: bool
) -> Callable[[Tensor, int], object]:
    def run(x: Tensor, k: int) -> object:
        with mock.patch.object(greedy, "_all_pairs", return_value=pairs):
            return function(x, k)

    return run


def _similarity(x: Tensor) -> Tensor:
    rows = unit_rows(x)
    return rows @ rows.T


def _max_min_in_steps(x: Tensor, k: int) -> Tensor:
    with mock.patch.object(greedy, "_all_pairs", return_value=False):
        return ops.farthest_first(x, k, ops.most_isolated(x))


def _coverage_in_steps(x: Tensor, k: int) -> Tensor:
    """Facility location with every gain taken anew in every step."""
    similarity = _similarity(x).T.contiguous()
    covered = similarity.new_zeros(len(x))
    chosen = torch.empty(k, dtype=torch.long)
    for step in range(k):
        index = (similarity - covered).clamp_min_(0).sum(1).argmax()
        chosen[step] = index
        covered = torch.maximum(covered, similarity[index])
    return chosen


def _dpp_in_steps(x: Tensor, k: int) -> Tensor:
    """The same determinantal point process, rows of its kernel made when they are needed."""
    rows = unit_rows(x)
    left, columns = rows.square().sum(1), rows.new_zeros(len(x), k)
    chosen = torch.empty(k, dtype=torch.long)
    for step in range(k):
        index = int(left.argmax())
        chosen[step] = index
        row = rows.mv(rows[index]) - columns[:, :step] @ columns[index, :step]
        columns[:, step] = row / left[index].sqrt()
        left = left - columns[:, step].square()
        left[index] = -torch.inf
    return chosen


def _even(x: Tensor, k: int) -> Tensor:
    return torch.arange(k) * len(x) // k


def cases() -> list[Case]:
    """All functions that select or merge."""
    return [
        *(
            Case(
                name,
                fast,
                {"steps": _forced(fast, False), "pairs": _forced(fast, True)},
                slow,
            )
            for name, fast, slow in (
                ("max_sum", ops.max_sum, naive.max_sum),
                ("farthest_first", ops.farthest_first, naive.farthest_first),
            )
        ),
        Case("max_min", ops.max_min, {"steps": _max_min_in_steps}, naive.max_min),
        Case(
            "coverage_greedy",
            lambda x, k: ops.coverage_greedy(_similarity(x), k),
            {"steps": _coverage_in_steps},
            lambda x, k: naive.coverage_greedy(_similarity(x), k),
        ),
        Case(
            "dpp_greedy",
            lambda x, k: ops.dpp_greedy(_similarity(x), k),
            {"steps": _dpp_in_steps},
            lambda x, k: naive.dpp_greedy(_similarity(x.double()), k),
        ),
        Case(
            "merge_into_nearest",
            lambda x, k: ops.merge_into_nearest(x, x, _even(x, k)),
            {"pairs": lambda x, k: _similarity(x)[:, _even(x, k)].argmax(1)},
            lambda x, k: naive.merge_into_nearest(x, x, _even(x, k)),
        ),
        Case(
            "bipartite_match",
            lambda x, k: ops.bipartite_match(x, k),
            {"pairs": lambda x, k: _similarity(x)[::2, 1::2].max(1)},
            naive.bipartite_match,
        ),
        Case(
            "density_peaks",
            lambda x, k: ops.density_peaks(x, max(1, k // 10), 8),
            {"pairs": lambda x, k: torch.cdist(x, x).topk(8, largest=False)},
            lambda x, k: naive.density_peaks(x, max(1, k // 10), 8),
        ),
        Case("top_k", lambda x, k: ops.top_k(x[:, 0], k), {}, lambda x, k: naive.top_k(x[:, 0], k)),
    ]


def measure(runs: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """Median milliseconds of each run, taken in turns after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            since = time.perf_counter()
            run()
            if turn:
                taken[name].append((time.perf_counter() - since) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def bench(n: int, k: int, d: int, dtype: torch.dtype, repeats: int, twins: bool) -> list[list[str]]:
    """Rows of text: name, ours, in steps, all pairs, ratio, and ours and the twin on a tenth."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(n, d, generator=generator) + torch.randn(d, generator=generator)).to(dtype)
    small, few = x[: max(2, n // 10)], max(1, k // 10)
    rows = []
    for case in cases():
        calls = {"ours": case.ours, **case.ways}
        runs = {name: functools.partial(call, x, k) for name, call in calls.items()}
        times = measure(runs, repeats)
        best = min((times[way] for way in case.ways), default=None)
        row = [case.name, f"{times['ours']:.1f}"]
        row += [f"{times[way]:.1f}" if way in times else "" for way in ("steps", "pairs")]
        row.append("" if best is None else f"{times['ours'] / best:.2f}")
        if twins:
            ours = measure({"ours": functools.partial(case.ours, small, few)}, repeats)["ours"]
            since = time.perf_counter()
            case.twin(small, few)
            row += [f"{ours:.2f}", f"{(time.perf_counter() - since) * 1e3:.0f}"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=2880, help="tokens")
    parser.add_argument("--k", type=int, default=288, help="tokens to keep")
    parser.add_argument("--d", type=int, default=1024, help="width")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-twins", action="store_true", help="leave the naive twins out")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dtype, twins = getattr(torch, args.dtype), not args.no_twins
    table = Table(box=SIMPLE_HEAD, title=f"{args.k} of {args.n} tokens, d = {args.d}, {args.dtype}")
    headers = ["ms", "vtc", "in steps", "all pairs", "ratio"]
    headers += ["vtc, a tenth", "naive, a tenth"] if twins else []
    for header in headers:
        table.add_column(header, justify="left" if header == "ms" else "right")
    for row in bench(args.n, args.k, args.d, dtype, args.repeats, twins):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
