# SPDX-License-Identifier: Apache-2.0
"""`vtc doctor`, the locks, and what starting costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version
from typer.testing import CliRunner

import vtc
from vtc.cli import app
from vtc.cli import environment as doctor

ROOT = Path(__file__).resolve().parents[2]


def _pins(name: str) -> dict[str, str]:
    """The lowest version of each distribution in a lock (a universal one may have several)."""
    pins: dict[str, str] = {}
    for line in (ROOT / name).read_text("utf-8").splitlines():
        if match := re.match(r"([a-z0-9-]+)==(\S+)", line):
            package, version = match.groups()
            if package not in pins or Version(version) < Version(pins[package]):
                pins[package] = version
    return pins


def _run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, env={**os.environ, **env},
    )  # fmt: skip


# ---- locks --------------------------------------------------------------------------------------
def test_the_tested_range_is_that_of_the_locks() -> None:
    locked, floor = _pins("requirements.lock"), _pins("requirements-floor.lock")
    for name, (oldest, newest) in doctor.TESTED.items():
        assert (floor[name], locked[name]) == (oldest, newest), name


def test_every_requirement_is_locked_and_within_its_bounds() -> None:
    """The floor is the lower bound itself: a bound that is not tested is a guess."""
    locked, floor = _pins("requirements.lock"), _pins("requirements-floor.lock")
    for line in metadata.requires(doctor.DISTRIBUTION) or ():
        requirement = doctor.Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        if name == doctor.DISTRIBUTION:
            continue
        assert requirement.specifier.contains(locked[name]), line
        lower = [s.version for s in requirement.specifier if s.operator == ">="]
        assert lower, f"{line}: no lower bound"
        # Those of no extra that the floor has may be in it for another package's sake.
        if any(f'extra == "{extra}"' in line for extra in ("eval", "test")) or "extra" not in line:
            assert Version(floor[name]).release[:2] == (*Version(lower[0]).release, 0)[:2], line


def test_locks_name_no_host_and_no_path() -> None:
    for name in ("requirements.lock", "requirements-floor.lock"):
        text = (ROOT / name).read_text("utf-8")
        assert not re.search(r"https?:|file:|index-url|find-links| /\w", text)


# ---- doctor -------------------------------------------------------------------------------------
@pytest.fixture
def nothing_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing all in a process of its own takes seconds, and is tested below."""
    monkeypatch.setattr(doctor, "broken_imports", lambda: iter(()))


def test_doctor_finds_this_environment_well() -> None:
    out = CliRunner().invoke(app, ["doctor"])
    assert out.exit_code == 0, out.output
    assert f"torch {metadata.version('torch')}" in out.output
    assert "cpu:" in out.output


@pytest.mark.parametrize(
    ("installed", "state", "bad"),
    [("3.32.7", "ok", False), ("4.3.1", "too new", True), ("3.1", "too old", True)],
)
def test_doctor_judges_versions(monkeypatch, nothing_imported, installed, state, bad) -> None:
    """filelock 4 is what broke every cell of `make demo` once."""
    known = metadata.version

    def version(name: str) -> str:
        return installed if name == "filelock" else known(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    (found,) = [f for f in doctor.findings() if f.name == "filelock"]
    assert (found.state, found.bad) == (state, bad)
    out = CliRunner().invoke(app, ["doctor"])
    assert out.exit_code == int(bad)
    assert f"filelock {installed}" in out.output
    assert (f"{state}: filelock" in out.output) == bad


def test_doctor_says_what_is_untested_and_what_is_missing(monkeypatch) -> None:
    def version(name: str) -> str:
        if name in ("transformers", "nbclient"):
            if name == "nbclient":
                raise metadata.PackageNotFoundError(name)
            return "99.0"
        return "1!0"

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {f.name: f for f in doctor.findings()}
    assert found["transformers"].state == "untested"
    assert not found["transformers"].bad
    assert found["nbclient"].state == "missing"
    assert found["nbclient"].remedy == 'pip install "vision-token-compression[notebooks]"'
    assert not found["nbclient"].bad  # an extra that nobody asked for


def test_an_extra_of_which_little_is_there_was_not_asked_for(monkeypatch, nothing_imported) -> None:
    """uv is there because `make demo` installs with it."""
    known, gone = metadata.version, {"mypy", "build", "types-PyYAML", "cosmic-ray", "ruff"}

    def version(name: str) -> str:
        if name in gone:
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    out = CliRunner().invoke(app, ["doctor"])
    assert "dev: not installed" in out.output
    assert "missing" not in out.output


def test_doctor_imports_what_a_version_cannot_tell(tmp_path: Path) -> None:
    (tmp_path / "lmms_eval").mkdir()
    (tmp_path / "lmms_eval" / "__init__.py").write_text("import filelock._no_such_module\n")
    seen = _run(
        "from vtc.cli.environment import broken_imports; print(list(broken_imports()))",
        PYTHONPATH=str(tmp_path),
    )
    assert "No module named 'filelock._no_such_module'" in seen.stdout, seen.stderr


# ---- starting -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "code",
    [
        "import vtc",
        "import vtc; vtc.__version__",
        "from vtc.cli import environment; from vtc.core import names",
        "from typer.testing import CliRunner; from vtc.cli import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
        "from typer.testing import CliRunner; from vtc.cli import app;"
        "assert CliRunner().invoke(app, ['--version']).output.strip() == '" + vtc.__version__ + "'",
        "from typer.testing import CliRunner; from vtc.cli import app;"
        "assert CliRunner().invoke(app, ['methods']).exit_code == 0",
    ],
    ids=["import", "names", "modules", "help", "version", "methods"],
)
def test_what_needs_no_model_starts_without_torch(code: str) -> None:
    heavy = "{'torch', 'transformers', 'lmms_eval', 'pandas', 'matplotlib'}"
    seen = _run(f"{code}\nimport sys; print(sorted({heavy} & set(sys.modules)))")
    assert seen.stdout.splitlines()[-1:] == ["[]"], seen.stdout + seen.stderr


def test_methods_start_without_transformers() -> None:
    seen = _run("import vtc; vtc.FastV(); import sys; print('transformers' in sys.modules)")
    assert seen.stdout.strip() == "False", seen.stderr


def test_public_names() -> None:
    seen = _run(
        "from vtc import *; import vtc, vtc.methods.tome as t; import vtc.presets.table as p;"
        "print(patch.__module__, t.ToMe is vtc.ToMe, 'fastv' in vtc.methods(), "
        "bool(vtc.presets('fastv')), 'FastV' in dir(vtc), bool(p.TABLE))"
    )
    assert seen.stdout.split() == ["vtc.patching", *["True"] * 5], seen.stderr
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vtc.nonsense


def test_doctor_speaks_where_torch_is_broken(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13 is missing')\n")
    seen = _run("from vtc.cli import app; app(['doctor'])", PYTHONPATH=str(tmp_path))
    assert "PyTorch cannot be imported: libcudart.so.13 is missing" in seen.stdout, seen.stderr
    assert "core: torch" in seen.stdout
    assert seen.returncode == 1
