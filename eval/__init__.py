# SPDX-License-Identifier: Apache-2.0
"""Evaluation: the embedded VLM, its generated tasks, and the harness around them."""
