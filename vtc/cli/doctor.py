# SPDX-License-Identifier: Apache-2.0
"""`vtc doctor`: whether the installed versions work together."""

from __future__ import annotations

import typer

from .console import output


def doctor() -> None:
    """Print versions, extras and devices, and what is missing, too old or too new.

    Exit code 1 if something prevents vtc, or an installed extra, from working.
    """
    from vtc import __version__
    from vtc.cli import environment as look

    console = output()
    console.print(f"vtc {__version__}, {look.system()}")
    for line in look.devices():
        console.print(f"  {line}", markup=False)
    bad = False
    groups: dict[str, list[look.Finding]] = {}
    for finding in look.findings():
        groups.setdefault(finding.extra, []).append(finding)
    for extra, found in groups.items():
        installed = [f"{f.name} {f.installed}" for f in found if f.installed]
        # Some packages of an extra may be installed for another reason.
        asked = 2 * len(installed) >= len(found)
        some = f"not installed, except {', '.join(installed)}" if installed else "not installed"
        listed = ", ".join(installed) if asked else some
        console.print(f"{extra}: {listed}", markup=False)
        for finding in found:
            if finding.state == "ok" or not (asked or finding.bad):
                continue
            bad = bad or finding.bad
            what = f"  {finding.state}: {finding.name} {finding.installed or ''}".rstrip()
            console.print(f"{what} ({finding.remedy})", style="red" * finding.bad, markup=False)
    for module, reason in look.broken_imports():
        bad = True
        console.print(f"cannot import {module}: {reason}", style="red", markup=False)
    console.print("something needs attention" if bad else "all is well")
    raise typer.Exit(int(bad))
