# SPDX-License-Identifier: Apache-2.0
"""Training for methods with weights: one loop, and a folder or file per method."""
