# SPDX-License-Identifier: Apache-2.0
"""Times the functions of `vtc.ops` against alternative algorithms and naive references.

    python -m vtc.eval.bench.ops                  288 of 2880 tokens at d = 1024
    python -m vtc.eval.bench.ops --n 576 --k 58 --d 4096 --threads 1
    python -m vtc.eval.bench.ops --official --threads 1     methods against their released code

A selector that compares tokens can work in steps, computing only the similarities that each choice
needs, or compute all pairs at once. Both are timed, interleaved with the library's function in one
process; `ratio` is the library's time over the faster one's. Density peaks need all pairs in any
case: they are compared with PyTorch's functions for distances and nearest points alone. Ranking
compares no tokens. Naive references loop in Python and run on a tenth of the tokens, as does the
library beside them; likewise four images in one call against four calls.
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

from . import released

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One function on (x, k): the library's call, the alternatives, and the naive reference."""

    name: str
    ours: Callable[[Tensor, int], object]
    ways: dict[str, Callable[[Tensor, int], object]]
    twin: Callable[[Tensor, int], object]


def _forced(
    function: Callable[[Tensor, int], object], pairs: bool
) -> Callable[[Tensor, int], object]:
    def run(x: Tensor, k: int) -> object:
        plainly = mock.patch.object(greedy, "_AHEAD_FROM", len(x) + 1)
        with plainly, mock.patch.object(greedy, "_all_pairs", return_value=pairs):
            return function(x, k)

    return run


def _similarity(x: Tensor) -> Tensor:
    rows = unit_rows(x)
    return rows @ rows.mT


def _least_similar(
    running: Tensor, row: Callable[[Tensor], Tensor], k: int, first: Tensor
) -> Tensor:
    """Farthest-first from `first`, given `running` similarities to it."""
    chosen = [first]
    for _ in range(1, k):
        running = running.index_fill(0, torch.stack(chosen), torch.inf)
        chosen.append(running.argmin())
        running = torch.maximum(running, row(chosen[-1]))
    return torch.stack(chosen)


def _max_min_in_steps(x: Tensor, k: int) -> Tensor:
    """The start needs all pairs, in blocks of rows; then one product per choice."""
    rows, first = unit_rows(x), ops.most_isolated(x)
    return _least_similar(rows.mv(rows[first]), lambda i: rows.mv(rows[i]), k, first)


def _max_min_of_pairs(x: Tensor, k: int) -> Tensor:
    pairs = _similarity(x)
    first = pairs.fill_diagonal_(-torch.inf).amax(1).argmin()
    return _least_similar(pairs[first], lambda i: pairs[i], k, first)


def _coverage(x: Tensor, k: int, pairs: bool) -> Tensor:
    """Facility location; each step updates the gains by the rows that are now covered better.

    The first gains need all pairs, in blocks of rows if they are not stored; the rows of a step are
    looked up or recomputed.
    """
    rows = unit_rows(x)
    similarity = rows @ rows.T if pairs else None
    covered, chosen = rows.new_zeros(len(x)), torch.empty(k, dtype=torch.long)
    gain = sum((part @ rows.T).clamp_min_(0).sum(0) for part in rows.split(512))
    assert isinstance(gain, Tensor)
    if similarity is not None:
        gain = similarity.clamp_min(0).sum(0)
    for step in range(k):
        chosen[step] = index = gain.argmax()
        column = rows.mv(rows[index]) if similarity is None else similarity[index]
        some = (column > covered).nonzero().squeeze(1)
        here = rows[some] @ rows.T if similarity is None else similarity[some]
        before, now = covered[some, None], column[some, None]
        gain = gain - (here.clamp_min(before) - here.clamp_min(now) + now - before).sum(0)
        gain[index] = -torch.inf
        covered[some] = column[some]
    return chosen


def _dpp(x: Tensor, k: int, pairs: bool) -> Tensor:
    """A determinantal point process; rows of the kernel are looked up or computed when needed."""
    rows = unit_rows(x)
    kernel = rows @ rows.T if pairs else None
    left, columns = rows.new_ones(len(x)), rows.new_zeros(len(x), k)  # units
    chosen = torch.empty(k, dtype=torch.long)
    for step in range(k):
        index = int(left.argmax())
        chosen[step] = index
        row = rows.mv(rows[index]) if kernel is None else kernel[index]
        row = row - columns[:, :step] @ columns[index, :step]
        columns[:, step] = row / left[index].sqrt()
        left = left - columns[:, step].square()
        left[index] = -torch.inf
    return chosen


def _merge(x: Tensor, k: int, pairs: bool) -> Tensor:
    """Means of kept tokens and those nearest to them, by all similarities or only the needed
    ones."""
    rows, kept = unit_rows(x), _even(x, k)
    group = ((rows @ rows.T)[:, kept] if pairs else rows @ rows[kept].T).argmax(1)
    group[kept] = torch.arange(k)
    total = rows.new_zeros(k, x.shape[1]).index_add_(0, group, x.to(rows))
    return total / torch.bincount(group, minlength=k)[:, None]


def _match(x: Tensor, k: int, pairs: bool) -> tuple[Tensor, Tensor]:
    """The k best pairs, by all similarities or only those of even with odd tokens."""
    rows = unit_rows(x)
    similarity = (rows @ rows.T)[::2, 1::2] if pairs else rows[::2] @ rows[1::2].T
    best, partner = similarity.max(1)
    merged = best.argsort(descending=True, stable=True)[:k]
    return merged, partner[merged]


def _both(way: Callable[[Tensor, int, bool], object]) -> dict[str, Callable[[Tensor, int], object]]:
    return {
        "steps": functools.partial(way, pairs=False),  # type: ignore[call-arg]
        "pairs": functools.partial(way, pairs=True),  # type: ignore[call-arg]
    }


def _even(x: Tensor, k: int) -> Tensor:
    return (torch.arange(k) * x.shape[-2] // k).expand(*x.shape[:-2], k)


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
        Case(
            "max_min",
            ops.max_min,
            {"steps": _max_min_in_steps, "pairs": _max_min_of_pairs},
            naive.max_min,
        ),
        Case(
            "coverage_greedy",
            lambda x, k: ops.coverage_greedy(_similarity(x), k),
            _both(_coverage),
            lambda x, k: naive.coverage_greedy(_similarity(x), k),
        ),
        Case(
            "dpp_greedy",
            lambda x, k: ops.dpp_greedy(unit_rows(x), k),
            _both(_dpp),
            lambda x, k: naive.dpp_greedy(_similarity(x.double()), k),
        ),
        Case(
            "merge_into_nearest",
            lambda x, k: ops.merge_into_nearest(x, x, _even(x, k)),
            _both(_merge),
            lambda x, k: naive.merge_into_nearest(x, x, _even(x, k)),
        ),
        Case(
            "bipartite_match",
            lambda x, k: ops.bipartite_match(x, k),
            _both(_match),
            naive.bipartite_match,
        ),
        Case(
            "density_peaks",
            lambda x, k: ops.density_peaks(x, max(1, k // 10), 8),
            {"pairs": lambda x, k: torch.cdist(x, x).topk(8, largest=False)},
            lambda x, k: naive.density_peaks(x, max(1, k // 10), 8),
        ),
        Case(
            "top_k", lambda x, k: ops.top_k(x[..., 0], k), {}, lambda x, k: naive.top_k(x[:, 0], k)
        ),
    ]


def measure(runs: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """Median milliseconds of each run, interleaved, after one warm-up round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            since = time.perf_counter()
            run()
            if turn:
                taken[name].append((time.perf_counter() - since) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def _in_turn(call: Callable[[Tensor, int], object], images: Tensor, k: int) -> list[object]:
    return [call(image, k) for image in images]


def bench(n: int, k: int, d: int, dtype: torch.dtype, repeats: int, twins: bool) -> list[list[str]]:
    """Rows of text: name, ours, in steps, all pairs, ratio; on a tenth of the tokens: four images
    in one call and in four, ours and the naive reference."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(n, d, generator=generator) + torch.randn(d, generator=generator)).to(dtype)
    small, few = x[: max(2, n // 10)], max(1, k // 10)
    images = torch.stack([small + i * small.roll(i, 0) for i in range(4)])
    rows = []
    for case in cases():
        calls = {"ours": case.ours, **case.ways}
        runs = {name: functools.partial(call, x, k) for name, call in calls.items()}
        times = measure(runs, repeats)
        best = min((times[way] for way in case.ways), default=None)
        row = [case.name, f"{times['ours']:.1f}"]
        row += [f"{times[way]:.1f}" if way in times else "" for way in ("steps", "pairs")]
        row.append("" if best is None else f"{times['ours'] / best:.2f}")
        four: dict[str, Run] = {
            "at once": functools.partial(case.ours, images, few),
            "in turn": functools.partial(_in_turn, case.ours, images, few),
        }
        row += [f"{taken:.2f}" for taken in measure(four, repeats).values()]
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
    parser.add_argument("--no-twins", action="store_true", help="skip the naive references")
    parser.add_argument("--official", action="store_true", help="compare with released code")
    parser.add_argument("--only", default="", help="with --official, only names containing this")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.official:
        released.show(args.n, args.k, args.d, args.repeats, args.only)
        return
    dtype, twins = getattr(torch, args.dtype), not args.no_twins
    title = f"{args.k} of {args.n} tokens, d = {args.d}, {args.dtype}"
    table = Table(box=SIMPLE_HEAD, title=title, collapse_padding=True, pad_edge=False)
    headers = ["ms", "vtc", "in steps", "all pairs", "ratio"]
    headers += ["4 x a tenth", "one by one"]
    headers += ["vtc, a tenth", "naive, a tenth"] if twins else []
    for header in headers:
        name = header == "ms"
        table.add_column(header, justify="left" if name else "right", no_wrap=name)
    for row in bench(args.n, args.k, args.d, dtype, args.repeats, twins):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
