# SPDX-License-Identifier: Apache-2.0
"""The machine of a run, for results and pages, without host name, user or path."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["load_average", "machine"]


def machine(device: str | None = None) -> dict[str, Any]:
    """What speed depends on: system, processor, cores, PyTorch threads, GPU. No host name.

    Args:
        device: the model's device; `None` for the first GPU, if there is one.

    Returns:
        Strings "system", "python" and "cpu"; integers "cores" and "threads"; the name "gpu",
        `None` without a GPU or if the model is not on it.
    """
    import torch

    cpu = platform.processor() or platform.machine()
    with suppress(OSError):  # exists only on Linux
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    gpu = None
    if torch.cuda.is_available() and device != "cpu":
        gpu = torch.cuda.get_device_name(device)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def load_average() -> list[float] | None:
    """Load averages over the last 1, 5 and 15 minutes; `None` if not available."""
    with suppress(OSError, AttributeError):
        return [round(x, 2) for x in os.getloadavg()]
    return None
