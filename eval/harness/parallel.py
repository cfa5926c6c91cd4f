# SPDX-License-Identifier: Apache-2.0
"""One run over several processes, each of which answers a part of every task's samples.

lmms-eval distributes the samples and gathers the scores, on accelerate's process group. This module
adds who writes, who waits, and how an error in one process reaches the others.
In a single process it does nothing.

`vtc eval --processes N` starts the processes itself. A cluster's launcher works too, with one
process per GPU:

    accelerate launch --multi_gpu --num_processes 8 -m vtc.cli eval --model ... --tasks ...
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

__all__ = ["everyone", "from_first", "launch", "launched", "rank", "start", "together", "world"]

T = TypeVar("T")


def rank() -> int:
    """The 0-based number of this process, set by the launcher."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


_LAUNCHED = "VTC_LAUNCHED"


def launched() -> bool:
    """Whether `launch` started this process, and so prints the results."""
    return _LAUNCHED in os.environ


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `vtc` with `arguments` in several processes; returns the exit code, 0 on success.

    This uses torchrun, as accelerate does for several GPUs; on a CPU, accelerate's own
    launcher starts several processes only with MPI.

    Args:
        arguments: command line without the program.
        processes: number of processes, at least 1.
    """
    import torch

    environment = {**os.environ, _LAUNCHED: "1"}
    # Otherwise each would use all cores.
    threads = max(1, torch.get_num_threads() // processes)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", "-m", "vtc.cli", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, env=environment, check=False).returncode


def start(device: str | None) -> None:
    """Join the other processes, if there are any; `device` as for `vtc eval`."""
    if world() > 1:
        from accelerate import Accelerator

        if _on_cpu(device):  # lmms-eval's own accelerators read it later
            os.environ["ACCELERATE_USE_CPU"] = "true"
        Accelerator()
        _leave_in_order()


@cache
def _leave_in_order() -> None:
    """Destroy the process group before Python exits.

    Otherwise a thread of gloo that still holds a tensor may release it during interpreter shutdown
    and abort the process (pytorch/pytorch#179291). On a busy machine this
    happened to a finished process, and the launcher terminated the others.
    """
    import torch.distributed as dist

    def leave() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(leave)


def _on_cpu(device: str | None) -> bool:
    import torch

    return device == "cpu" or (device is None and not torch.cuda.is_available())


def everyone(value: T) -> list[T]:
    """The values of all processes, in order."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """The result of `make` in the first process; the others do not call it.

    Raises:
        Exception: what `make` raised, in every process.
    """
    if world() == 1:
        return make()
    import torch.distributed as dist

    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = make()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def together(act: Callable[[], T]) -> T:
    """The result of `act`, if it fails in no process.

    Raises:
        Exception: what it raised in this process.
        RuntimeError: it failed in another process, which this one would otherwise wait for forever.
    """
    failed: Exception | None = None
    try:
        found = act()
    except Exception as error:
        failed = error
    told = everyone(None if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    for number, text in enumerate(told):
        if text is not None:
            raise RuntimeError(f"in process {number}: {text}")
    return found
