"""What is wrong with a network's gradients: where, by which evidence, and what to do about it."""
