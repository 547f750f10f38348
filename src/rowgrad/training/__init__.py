"""Training loops that measure examples while they train."""
