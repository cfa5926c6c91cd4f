# SPDX-License-Identifier: Apache-2.0
"""Which share of mutants a method's own tests kill: `python -m tests.mutation`.

Mutants are cosmic-ray's (extra `dev`), which starts a process with PyTorch for each of
them. Here one process imports what tests need, and forks for each: the child imports vtc with the
mutated source of one file and runs that file's own tests (`OWN`) until one fails.

Of the places of a file that can be mutated a seeded sample is taken, and one mutation of each.
Annotations, decorators' arguments, `strict=` and the constants that say how much is worked on at
once are none, and neither are mutations that Python cannot tell from the original (`x is None` to
`x == None`). What was found is added to a file of JSON, so that a run may be stopped and repeated;
mutants whose file or tests have changed since are run again.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parents[1]
_SETTINGS, _OPS = "core/test_method_settings.py", "ops/test_ops.py"
_COVERAGE = "methods/test_method_coverage.py"


def _of(file: str, chosen: str = "") -> tuple[str, str]:
    return f"{file} {_SETTINGS}", chosen


OWN: dict[str, tuple[str, str]] = {
    "methods/atp": _of("methods/test_method_atp.py", "atp and not catp"),
    "core/method": (
        f"core/test_methods.py {_SETTINGS} methods/test_method_baselines.py core/test_keep.py", ""
    ),
    "methods/catp": _of(_COVERAGE, "catp"),
    "methods/cdpruner": _of("methods/test_method_selectors.py", "cdpruner"),
    "methods/correlation": _of(
        "methods/test_method_selectors.py",
        "correlation or density or crop or outliers or sampling or accept",
    ),
    "methods/dart": _of("methods/test_method_baselines.py", "dart"),
    "methods/divprune": _of("methods/test_method_baselines.py", "divprune"),
    "methods/downsample": _of(
        "core/test_methods.py runtime/test_pixels.py", "downsample or pixels or tiles"
    ),
    "methods/fastv": _of("core/test_methods.py", "fastv"),
    "methods/flowcut": _of("methods/test_method_encoder.py", "flowcut"),
    "methods/holov": _of("methods/test_method_holov.py", "holov"),
    "methods/mmtok": _of(_COVERAGE, "mmtok"),
    "methods/pool": _of("core/test_methods.py", "pool or tiles"),
    "methods/prumerge": _of("methods/test_method_prumerge.py", "prumerge"),
    "methods/pyramiddrop": _of(
        "methods/test_method_baselines.py", "pyramiddrop or shares or depth"
    ),
    "methods/random": _of("core/test_methods.py", "random"),
    "methods/scope": _of(_COVERAGE, "scope"),
    "methods/sparsevlm": _of("methods/test_method_sparsevlm.py", "sparsevlm"),
    "methods/split": ("methods/test_method_split.py", ""),
    "methods/todre": _of("core/test_methods.py", "todre"),
    "methods/tome": _of("methods/test_method_encoder.py", "tome"),
    "methods/transprune": _of("methods/test_method_transprune.py", "transprune"),
    "methods/v2drop": _of("methods/test_method_baselines.py", "v2drop or shares or depth"),
    "methods/visionzip": _of("methods/test_method_baselines.py", "visionzip"),
    "methods/vispruner": _of("methods/test_method_selectors.py", "vispruner"),
    "methods/vscan": _of("methods/test_method_selectors.py", "vscan"),
    "ops/ahead": ("ops/test_ahead.py", ""),
    "ops/batch": (_OPS, "batch or several_images"),
    "ops/bipartite": (_OPS, "match"),
    "ops/coverage": (
        f"{_COVERAGE} {_OPS}", "coverage_ or greedy_coverage or cover_each or copy_adds or factors"
    ),
    "ops/density": (_OPS, "densit or distances or mirrored"),
    "ops/dpp": (f"ops/test_dpp.py {_OPS}", "test_dpp or dpp_greedy or refuse"),
    "ops/greedy": (
        _OPS, "greedy or max or center or isolated or tenth or equal or many or gradient"
    ),
    "ops/merging": (
        f"methods/test_method_selectors.py {_OPS}", "merging or merge_into or groups or batches"
    ),
    "ops/pooling": (_OPS, "cell_grid or pool or interpolation or frames or crops"),
    "ops/ranking": (_OPS, "top_k or batches"),
    "ops/similarity": (_OPS, "unit_rows or lengths or refuse or gradient or precision or sums"),
}  # fmt: skip
"""For each file below vtc its own tests: files below tests, and an expression for `pytest -k`."""

_SAME = ("Is_Eq", "IsNot_NotEq", "Eq_Is", "NotEq_IsNot", "Variable")
"""Parts of the names of operators whose mutants mean the same, or that need arguments."""

_SIZES = ("_AT_ONCE", "_UP_TO", "AHEAD", "FRONT")
"""How names end of constants on which only speed depends."""


def places(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """What can be mutated: by line and column, operators and which of their occurrences."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    spared = list(_spared(ast.parse(source)))
    tree, found = get_ast(source), dict[tuple[int, int], list[tuple[str, int]]]()
    for name in sorted(plugins.operator_names()):
        if any(part in name for part in _SAME):
            continue
        operator, occurrence = plugins.get_operator(name)(), 0
        for node in ast_nodes(tree):
            for start, _ in operator.mutation_positions(node):
                if not any(first <= start < last for first, last in spared):
                    found.setdefault(start, []).append((name, occurrence))
                occurrence += 1
    return found


def _spared(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where what is not mutated begins and ends."""
    for node in ast.walk(tree):
        nodes = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.keyword) and node.arg == "strict":
            nodes.append(node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith(_SIZES):
            nodes.append(node)
        for decorator in getattr(node, "decorator_list", ()):
            nodes += getattr(decorator, "keywords", ())
        for of in nodes:
            if of is not None:
                yield (of.lineno, of.col_offset), (of.end_lineno, of.end_col_offset)


class _Mutated:
    """Finds the module `name` with another source."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        code: CodeType = compile(self.source, str(self.path), "exec")
        exec(code, module.__dict__)


def run(file: str, source: str, limit: float) -> str:
    """ "killed", "survived" or "timeout": what the file's own tests make of it with this source."""
    tests, chosen = OWN[file]
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        name = "vtc." + file.replace("/", ".")
        sys.meta_path.insert(0, _Mutated(name, ROOT / "vtc" / f"{file}.py", source))  # type: ignore[arg-type]
        import pytest

        options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore"]
        paths = [str(ROOT / "tests" / test) for test in tests.split()]
        code = 70
        try:
            code = int(pytest.main([*options, *(["-k", chosen] if chosen else []), *paths]))
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code == 5:
                raise ValueError(f"{file}: no test is its own")
            return "killed" if code else "survived"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--files", nargs="*", default=list(OWN), help="such as methods/catp")
    parser.add_argument("--count", type=int, default=20, help="mutants of a file; 0 for all places")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    given = parser.parse_args()
    known = json.loads(given.out.read_text()) if given.out.exists() else {}
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code
    from transformers import LlavaForConditionalGeneration  # noqa: F401

    torch.set_num_threads(1)
    for file in given.files:
        source = (ROOT / "vtc" / f"{file}.py").read_text()
        tests = "".join((ROOT / "tests" / t).read_text() for t in OWN[file][0].split())
        state = hashlib.sha256((source + tests + OWN[file][1]).encode()).hexdigest()[:16]
        begun = time.monotonic()
        if run(file, source, 600) != "survived":
            raise SystemExit(f"{file}: its own tests fail without any mutation")
        limit = 20 + 10 * (time.monotonic() - begun)
        drawn = random.Random(f"{given.seed} {file}")
        found = sorted(places(source).items())
        if 0 < given.count < len(found):
            found = sorted(drawn.sample(found, given.count))
        old = {k: v for k, v in known.get(file, {}).items() if v["state"] == state}
        known[file] = old
        for (line, column), ways in found:
            name, occurrence = drawn.choice(ways)
            key = f"{line}:{column} {name.removeprefix('core/')}"
            if key not in old:
                mutant = mutate_code(source, plugins.get_operator(name)(), occurrence)
                at = mutant.splitlines()[line - 1].strip()
                old[key] = {"state": state, "result": run(file, mutant, limit), "line": at}
                given.out.write_text(json.dumps(known, indent=1))
        left = [f"  {k}: {v['line']}" for k, v in old.items() if v["result"] == "survived"]
        share = 1 - len(left) / max(1, len(old))
        print(f"{file}: {len(old) - len(left)} of {len(old)} killed, {share:.0%}", *left, sep="\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
