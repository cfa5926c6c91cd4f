# SPDX-License-Identifier: Apache-2.0
"""Measures start-up time: `python -m vtc.eval.bench.start`.

Each line is a fresh process; processes are interleaved. Printed are the median CPU seconds (user
and system) and their ratio to those of `import torch`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

_COMMANDS = {
    "import torch": "import torch",
    "import vtc": "import vtc",
    "import torch, vtc": "import torch, vtc",
    "import vtc; vtc.FastV": "import vtc; vtc.FastV",
    "import torch, transformers": "import torch, transformers; transformers.PreTrainedModel",
    "import vtc; vtc.patch": "import vtc; vtc.patch",
    "vtc --help": "from vtc.cli import app; app(['--help'])",
    "vtc --version": "from vtc.cli import app; app(['--version'])",
    "vtc methods": "from vtc.cli import app; app(['methods'])",
}


def measure(turns: int = 5) -> dict[str, tuple[float, float]]:
    """(CPU seconds, wall seconds) of each command, medians over `turns` interleaved rounds."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in _COMMANDS}
    for _ in range(turns):
        for name, code in _COMMANDS.items():
            # The process reports its own times: the parent only has the sum over all children.
            script = f"import atexit, os, sys; atexit.register(lambda: sys.stderr.write(\
'%.4f' % sum(os.times()[:2])))\n{code}"
            started = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
            wall = time.perf_counter() - started
            seen[name].append((float(done.stderr.split()[-1]), wall))
    return {
        name: tuple(statistics.median(column) for column in zip(*rows, strict=True))
        for name, rows in seen.items()
    }


def main() -> None:
    """Print the table."""
    found = measure()
    alone = found["import torch"][0]
    print(f"{'':28}{'CPU s':>8}{'s':>8}{'/ torch':>9}")
    for name, (cpu, wall) in found.items():
        print(f"{name:28}{cpu:8.2f}{wall:8.2f}{cpu / alone:9.2f}")


if __name__ == "__main__":
    main()
