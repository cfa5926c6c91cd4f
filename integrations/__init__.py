# SPDX-License-Identifier: Apache-2.0
"""Bridges from vtc to other projects, imported as `vtc.integrations`."""
