# SPDX-License-Identifier: Apache-2.0
"""`vtc reproduce`."""

from __future__ import annotations

import vtc


def test_a_dry_run_says_why_rows_are_not_run(cli):
    result = cli("reproduce", "llava-1.5-7b", "--dry-run")
    assert result.exit_code == 0, result.output
    left = [line for line in result.output.splitlines() if line.startswith("not run: ")]
    assert "not run: SIEVE at 64 tokens: vtc has no SIEVE" in left
    (prumerge,) = (line for line in left if "PruMerge" in line)
    assert "follows the image" in prumerge
    # Of nothing that vtc has is it said that vtc has it not.
    for line in left:
        assert line.rpartition("vtc has no ")[2].lower() not in vtc.methods()
