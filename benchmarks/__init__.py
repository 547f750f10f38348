"""What rows cost: this library, its rivals and the plain step, on the same models."""
