"""Known errors planted in the targets, to measure how well an audit finds them."""

import torch

from rowgrad.errors import InputError


def flip_labels(
    targets: torch.Tensor, n_classes: int, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give `share` of the examples, drawn uniformly, another class, drawn uniformly from the others.

    Returns the corrupted targets and a mask of the changed examples, both of shape (N,).
    """
    chosen = _chosen(targets, share, generator, at_least=1)
    flipped = targets.clone()
    shift = torch.randint(1, n_classes, (len(chosen),), generator=generator)
    flipped[chosen] = (targets[chosen] + shift) % n_classes
    return flipped, flipped != targets


def permute_targets(
    targets: torch.Tensor, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pass the targets of `share` of the examples around among themselves, so that each has the target of another.

    Returns the corrupted targets and a mask of the changed examples, both of shape (N,); a chosen example whose new
    target equals its old one has not changed.
    """
    chosen = _chosen(targets, share, generator, at_least=2)
    permuted = targets.clone()
    permuted[chosen] = targets[chosen.roll(1)]
    return permuted, permuted != targets


def _chosen(targets: torch.Tensor, share: float, generator: torch.Generator, at_least: int) -> torch.Tensor:
    if not 0 < share <= 0.5:
        raise InputError(f"--flip {share:g}: the share of corrupted targets must be above 0 and at most 0.5")
    count = max(at_least, round(share * len(targets)))
    return torch.randperm(len(targets), generator=generator)[:count]
