# SPDX-License-Identifier: Apache-2.0
"""Imports go downwards: each room of vtc knows those below it, and eval is known to the command
line only."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import (
    PACKAGES,
    Import,
    Module,
    cycles,
    imports,
    is_private,
    private_attributes,
    private_reads,
    read,
)

BELOW: dict[str, set[str]] = {
    "ops": set(),
    "core": {"ops"},
    "methods": {"core", "ops"},
    "tokenizers": {"core", "ops"},
    "projectors": {"core", "ops"},
    "cost": {"core", "ops"},
    "report": {"core", "cost"},
    "models": {"core"},
    "runtime": {"core", "ops", "report"},
    "runtime.hf": {"core", "models", "ops", "report", "runtime"},
    "patching": {"core", "models", "report", "runtime", "runtime.hf"},
    "presets": {"core", "cost", "methods", "ops"},
    "viz": {"core", "models", "patching", "report"},
    "training": {
        "core", "methods", "models", "ops", "patching", "report", "runtime", "runtime.hf",
    },
}  # fmt: skip
"""By room of vtc, the rooms that it may import, at any time. The command line may import all."""

OUTSIDE: dict[str, set[str]] = {
    "ops": {"numpy", "torch"},
    "core": {"torch"},  # in calls only: test_contracts_are_imported_without_torch
    "methods": {"numpy", "safetensors", "torch"},
    "tokenizers": {"numpy", "safetensors", "torch"},
    "projectors": {"numpy", "safetensors", "torch"},
    "cost": {"torch"},
    "report": {"torch"},
    "runtime": {"torch"},
    "presets": set(),
}
"""By room, what it may import that is not of Python or vtc, for type checkers apart."""

BY_NAME = {("vtc.core.registry", "vtc.methods"), ("vtc.methods", "vtc.patching")}
"""Imports upwards that are meant: the registry knows no method, it looks for them by name when it
is first asked, as it does in the packages of others; and `vtc.methods(model)` is of the package, so
that it can be called, but asks what `patch` would."""

ANYWHERE = {"vtc.core.errors"}
"""What every room may import: the errors it raises. They import nothing of vtc themselves."""

NAMED = {"vtc.training.atp.command": {"vtc.eval.embedded.training.atp"}}
"""What is above a module and written in it as a text, for the user to choose another by."""

MODULES = read()
IMPORTS = [found for module in MODULES.values() for found in imports(module, MODULES)]


def room(name: str) -> str:
    """ "ops", "runtime.hf", "eval.harness", ...; "" for the package `vtc` itself."""
    parts = name.split(".")[1:]
    deep = parts[:2] == ["runtime", "hf"] or parts[:1] == ["eval"]
    return ".".join(parts[: 2 if deep else 1])


def ours(found: Import) -> bool:
    return found.target.partition(".")[0] == "vtc"


def in_vtc(found: Import) -> bool:
    """In a room below the command line."""
    return room(found.source).partition(".")[0] not in ("", "cli", "eval", "integrations")


def test_every_room_has_its_place() -> None:
    rooms = {room(name) for name in MODULES} - {"", "cli", "integrations"}
    assert {name for name in rooms if not name.startswith("eval")} == set(BELOW), (
        "say in BELOW what a new room may import"
    )


def test_imports_go_downwards() -> None:
    wrong = [
        f"{found.place} imports {found.target}"
        for found in IMPORTS
        if ours(found) and in_vtc(found)
        and room(found.target) not in {room(found.source), *BELOW.get(room(found.source), ())}
        and (found.source, found.target) not in BY_NAME
        and found.target not in ANYWHERE
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_the_exceptions_are_there_still() -> None:
    assert {(found.source, found.target) for found in IMPORTS} >= BY_NAME
    assert not [found.place for found in IMPORTS if ours(found) and found.source in ANYWHERE]


def test_names_of_what_is_above_are_not_hidden_in_texts() -> None:
    """`import_module` takes any text, so a whole text that is a name counts like an import."""
    above = re.compile(r"vtc\.(cli|eval|integrations)(\.\w+)*")
    for module in MODULES.values():
        if room(module.name).partition(".")[0] in ("cli", "eval", "integrations"):
            continue
        texts = {
            node.value
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found = {text for text in texts if above.fullmatch(text)}
        assert found == NAMED.get(module.name, set()), module.name


def test_low_rooms_import_little() -> None:
    wrong = [
        f"{found.place} imports {found.target}"
        for found in IMPORTS
        if room(found.source) in OUTSIDE and not ours(found) and found.when != "types"
        and (top := found.target.partition(".")[0]) not in sys.stdlib_module_names
        and top not in OUTSIDE[room(found.source)]
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_no_room_imports_private_names_of_another() -> None:
    wrong = [
        f"{found.place} imports {found.name} of {found.target}"
        for found in IMPORTS
        if ours(found) and found.name is not None and is_private(found.name)
        and room(found.source) != room(found.target)
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "package", ["vtc.cli", "vtc.eval", "vtc.integrations", "vtc.training", "vtc.viz"]
)
def test_what_uses_vtc_uses_public_attributes(package: str) -> None:
    """An attribute with an underscore is private to the room whose modules or classes have it."""
    homes: dict[str, set[str]] = {}
    for module in MODULES.values():
        for name in private_attributes(module):
            homes.setdefault(name, set()).add(room(module.name))
    wrong = []
    for module in MODULES.values():
        if not f"{module.name}.".startswith(f"{package}."):
            continue
        modules = {
            found.bound: found.target
            for found in IMPORTS
            if found.source == module.name and ours(found) and found.name is None
        }
        for base, name, line in private_reads(module):
            owners = {room(modules[base])} if base in modules else homes.get(name, set())
            if not owners or room(module.name) in owners:
                continue
            wrong.append(f"{module.name}:{line} reads {name} of {', '.join(sorted(owners))}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES.values())
def test_modules_do_not_import_one_another_in_a_circle(package: str) -> None:
    """In eval not for type checkers either; in vtc these may name what calls them."""
    counted = {"import", "types"} if package == "vtc.eval" else {"import"}
    own = {
        name
        for name in MODULES
        if name.startswith(package)
        and (package != "vtc" or not name.startswith(("vtc.eval", "vtc.integrations")))
    }
    edges: dict[str, set[str]] = {name: set() for name in own}
    for one in IMPORTS:
        if one.when in counted and one.source in own and one.target in own:
            edges[one.source].add(one.target)
    found = cycles(edges)
    assert not found, "\n".join(" <-> ".join(group) for group in found)


BLOCKED = """
import sys

class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == {blocked!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked)
"""

CHOOSES = """
import torch
import vtc.core, vtc.methods, vtc.ops, vtc.runtime.stages, vtc.runtime.executors
from vtc.core import VisionTokens, make, methods

SETTINGS = {"atp": {"theta_r": 0.2, "theta_s": 0.8}}  # it has no defaults: heads are trained

for name in methods():
    make(name, **SETTINGS.get(name, {}))
generator = torch.Generator().manual_seed(0)
place = torch.arange(36)
grid = torch.stack([torch.zeros_like(place), place // 6, place % 6], dim=1)
tokens = VisionTokens(features=torch.randn(36, 8, generator=generator), grid=grid)
chosen = make("divprune", keep=9).select(tokens)
assert len(chosen.indices) == 9, chosen
assert "transformers" not in sys.modules
print("done")
"""


def _python(code: str, tmp_path: Path) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_methods_choose_without_transformers(tmp_path: Path) -> None:
    assert _python(BLOCKED.format(blocked="transformers") + CHOOSES, tmp_path) == "done\n"


def test_contracts_are_imported_without_torch(tmp_path: Path) -> None:
    code = BLOCKED.format(blocked="torch") + "import vtc, vtc.core, vtc.core.spec\nprint('done')"
    assert _python(code, tmp_path) == "done\n"


def test_faults_are_found() -> None:
    """The reading itself: every kind of import, and circles."""
    text = """
from typing import TYPE_CHECKING
import vtc.ops as o
if TYPE_CHECKING:
    from vtc.core import Method
def later():
    from .. import ops
    from vtc.viz.trace import _hidden
    import_module("vtc.eval")
"""
    module = Module("vtc.methods.x", Path("x.py"), ast.parse(text))
    found = {(i.target, i.name, i.when) for i in imports(module, MODULES)}
    assert found == {
        ("typing", "TYPE_CHECKING", "import"),
        ("vtc.ops", None, "import"),
        ("vtc.core", "Method", "types"),
        ("vtc.ops", None, "call"),
        ("vtc.viz.trace", "_hidden", "call"),
        ("vtc.eval", None, "call"),
    }
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert cycles({"a": {"b"}, "b": set()}) == []
