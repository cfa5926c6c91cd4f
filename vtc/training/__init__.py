# SPDX-License-Identifier: Apache-2.0
"""Training for methods that need trained weights: one loop, and one folder or file per method."""
