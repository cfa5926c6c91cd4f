# SPDX-License-Identifier: Apache-2.0
"""`vtc suite`."""

from __future__ import annotations


def test_suite_refuses_other_tasks(cli, tmp_path):
    result = cli("suite", "pope", "--out", tmp_path)
    assert result.exit_code == 2
    assert "vtc_scenes, vtc_photo, vtc_mosaic" in result.output
