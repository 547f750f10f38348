"""Checks against the slow truth, for users: rows against one backward pass each, gradients against differences."""
