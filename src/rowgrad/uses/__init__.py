"""What rows are for: auditing labels from a training run."""
