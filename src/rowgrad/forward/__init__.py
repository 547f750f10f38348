"""Derivatives along a direction, carried along with the forward pass: no graph, no backward pass."""
