# SPDX-License-Identifier: Apache-2.0
"""What `vtc doctor` prints: versions, extras, devices, and what is missing, too old or too new.

Reads the metadata of installed packages; imports a package only to check that it can be imported.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

DISTRIBUTION = "vision-token-compression"

TESTED = {
    "torch": ("2.6.0", "2.14.1"),
    "transformers": ("5.20.0", "5.24.0"),
    "lmms-eval": ("0.7.3", "0.7.3"),
}
"""The oldest and the newest release that the tests run on: those of the two locks."""

EXTRAS = ("eval", "training", "notebooks", "test", "dev")
_IMPORTS = {"core": "transformers", "eval": "lmms_eval.evaluator"}
"""Modules to import: some conflicts between packages show only on import."""


@dataclass(frozen=True)
class Finding:
    """One requirement and what is installed of it.

    Attributes:
        extra: "core" or the extra that requires it.
        name: name of the distribution.
        installed: its version, or `None`.
        state: "ok", "missing", "too old", "too new" or "untested".
        remedy: what to do, "" if nothing is wrong.
    """

    extra: str
    name: str
    installed: str | None
    state: str
    remedy: str = ""

    @property
    def bad(self) -> bool:
        """Whether it prevents vtc, or an extra in use, from working."""
        return self.state in ("too old", "too new") or (
            self.state == "missing" and self.extra == "core"
        )


def findings() -> list[Finding]:
    """Every requirement of vtc and its extras."""
    found = []
    for line in metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        if requirement.name == DISTRIBUTION:
            continue
        for extra in ("core", *EXTRAS):
            if _applies(requirement, extra):
                found.append(_judge(extra, requirement))
                break
    return sorted(found, key=lambda f: ("core", *EXTRAS).index(f.extra))


def _applies(requirement: Requirement, extra: str) -> bool:
    if requirement.marker is None:
        return extra == "core"
    return requirement.marker.evaluate({"extra": "" if extra == "core" else extra})


def _judge(extra: str, requirement: Requirement) -> Finding:
    name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        what = DISTRIBUTION if extra == "core" else f"{DISTRIBUTION}[{extra}]"
        return Finding(extra, name, None, "missing", f'pip install "{what}"')
    if requirement.specifier.contains(installed, prereleases=True):
        newest = TESTED.get(name, ("", ""))[1]
        if newest and Version(installed).release > Version(newest).release:
            return Finding(extra, name, installed, "untested", f"tested up to {newest}")
        return Finding(extra, name, installed, "ok")
    below = any(
        s.operator in (">=", ">", "==", "~=") and Version(installed) < Version(s.version)
        for s in requirement.specifier
    )
    return Finding(
        extra, name, installed, "too old" if below else "too new", f'pip install "{wanted}"'
    )


def broken_imports() -> Iterator[tuple[str, str]]:
    """(module, reason) of each large installed package that cannot be imported.

    Each import runs in its own process, as a library may abort.
    """
    for extra, module in _IMPORTS.items():
        name = {"core": "transformers", "eval": "lmms-eval"}[extra]
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        tried = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False
        )
        if tried.returncode:
            lines = tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"]
            yield module, lines[-1]


def devices() -> list[str]:
    """A line for each device that PyTorch can use."""
    try:
        import torch
    except Exception as error:  # a broken build may raise anything
        return [f"PyTorch cannot be imported: {error}"]
    found = [f"cpu: {os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i}: {seen.name}, {seen.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps: Apple GPU")
    if not torch.cuda.device_count():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without"
        found.append(f"no CUDA device (PyTorch is {built})")
    return found


def system() -> str:
    """Python and the machine, in one line."""
    return f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
