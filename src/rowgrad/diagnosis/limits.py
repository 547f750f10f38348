"""Where healthy ends: every limit a diagnosis compares with, in one table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Dimensionless limits; `Limits(dead=0.9)` changes one.

    Healthy networks stay inside all of them, at initialization and in training: default multilayer perceptrons of two
    to six layers, residual convolutional nets with BatchNorm or GroupNorm, transformers, LSTMs (see the tests).

    Attributes:
        fall: a cotangent or an activation shrinks by this over all layers, or grows by 1 / fall. Float16 ends at 6e-8,
            and a default ReLU perceptron of six layers, which learns, is at 1e-2.
        per_layer: and by this in the geometric mean of the layers, so that depth alone is not reported.
        far: or by this over all layers, however many: beyond it float16 holds nothing and clipping decides every step.
        slope: an activation is saturated where its slope is below this part of its largest (o(1-o) of 1/4, 1-o^2 of 1).
        saturated: share of saturated entries in a layer.
        dead: share of a layer's rectifiers that are 0 for every example. Deep default networks start with up to 64%,
            most of which come alive as the layers below them change.
        dead_note: the same, over several batches, from which on it is worth a note.
        dead_still: the same for units that were 0 at an earlier time too and whose weights kept their direction since.
            Forty percent is what too high a rate leaves (Karpathy, CS231n).
        copies: distance between two units, weights and gradients, over their size, below which they are the same.
        input_spread: largest feature over the smallest, in maxima of absolute values; integer pixels have 16 to 255.
        input_offset: mean of a feature over the root mean square of the features' standard deviations. The loss is then
            steeper along that feature's weight by the square of it.
        input_size: root mean square of the inputs, from 1 / input_size up; initializers are made for 1.
        column_ratio: gradients of the weights of different features, largest over lower quartile.
        weight_ratio: gradients over weights, largest layer over smallest; healthy ones have up to 90.
        update: size of a step over size of the weight, lower and upper end, for the median weight. Usual is 1e-4 to
            1e-2 (Bottou 2015: about 1e-3); single steps of healthy training lie between 5e-5 and 8e-2.
        start: loss above log K at initialization, in nats; logits of standard deviation 1 cost about 1/2.
        cliff: what the loss is too high by after the step, against its quadratic model and where it started, over the
            loss or the decrease that the slope promises, the larger. A trust region shrinks at 1/4 (Conn, Gould and
            Toint 2000); near the end of training healthy steps reach 1.5.
        drift: distance between a layer's mean inputs at two times, in standard deviations; the first epoch from a
            default initialization moves them by up to 10, later ones by 1.

    >>> Limits(dead=0.9).dead, Limits().dead
    (0.9, 0.75)
    """

    fall: float = 1e-3
    per_layer: float = 0.7
    far: float = 1e-5
    slope: float = 0.1
    saturated: float = 0.7
    dead: float = 0.75
    dead_note: float = 0.25
    dead_still: float = 0.4
    copies: float = 1e-6
    input_spread: float = 100.0
    input_offset: float = 30.0
    input_size: float = 30.0
    column_ratio: float = 100.0
    weight_ratio: float = 1e3
    update: tuple[float, float] = (1e-5, 0.3)
    start: float = 1.0
    cliff: float = 4.0
    drift: float = 20.0
