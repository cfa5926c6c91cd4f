# SPDX-License-Identifier: Apache-2.0
"""One run over several processes, each of which answers its share of every task's samples.

lmms-eval deals the samples out and gathers the scores, on accelerate's process group; here is what
a run needs besides: who writes, who waits, and what becomes of an error that one process has alone.
In a run of one process all of it does nothing.

`vtc eval --processes N` starts the processes itself. A cluster's own launcher does as well, one
process for each GPU:

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
    """The number of this process, from 0; the launcher says so."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


_LAUNCHED = "VTC_LAUNCHED"


def launched() -> bool:
    """Whether `launch` started this process, and so prints what comes out."""
    return _LAUNCHED in os.environ


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `vtc` with `arguments` in so many processes; returns the exit code, 0 if all went well.

    Started by torchrun, which is also what accelerate launches several GPUs with; accelerate's own
    launcher starts several processes on a CPU with MPI only.

    Args:
        arguments: of the command line, without the program.
        processes: at least 1.
    """
    import torch

    environment = {**os.environ, _LAUNCHED: "1"}
    # Each would take all cores.
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

        if _on_cpu(device):  # those that lmms-eval makes later read it as well
            os.environ["ACCELERATE_USE_CPU"] = "true"
        Accelerator()
        _leave_in_order()


@cache
def _leave_in_order() -> None:
    """Have the process group taken down before Python is.

    Left to itself, a thread of gloo that still holds a tensor lets go of it while the interpreter
    ends, and aborts the process for want of it (pytorch/pytorch#179291). On a busy machine that
    happened to a process that was done, and the launcher ended the others for it.
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
    """The values of all processes, in their order."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process; it is not called in the others.

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
    """What `act` returns, if it failed in no process.

    Raises:
        Exception: what it raised here.
        RuntimeError: it failed elsewhere; who does not know would wait for that process for ever.
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
