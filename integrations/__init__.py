# SPDX-License-Identifier: Apache-2.0
"""Integrations with other projects, imported as `vtc.integrations`."""
