"""Every error rowgrad raises on purpose.

RowgradError
├── GraphError                   the losses or their graph cannot be read
│   ├── NotAVectorError          losses are a scalar, or have more than one dimension
│   ├── NoGraphError             no graph: detached, under no_grad, from inference mode
│   ├── FreedGraphError          the graph was freed by an earlier backward
│   └── OpaqueGraphError         part of the graph hides parameters (reentrant checkpointing, compiled regions)
├── ParameterError               what was passed as `params` cannot have rows
│   └── HookedParameterError     a tensor hook on a parameter may change its gradient
├── ForwardModeError             an operation has no derivative in forward mode
├── IndependenceError            examples are mixed where independent ones are needed
├── NonFiniteError               a loss, or a derivative of it, is inf or nan
├── InputError                   a file, a column or an option given by the user cannot be used
│   ├── DivergedError            a training ended in losses that are not finite
│   └── UserCodeError            a function given by the user raised
├── WrongGradientError           a check during training found a gradient that is not the derivative of the loss
├── StaleJacobianError           a parameter changed after the Jacobian was made
└── ConsumedJacobianError        the factors were already used up by `backward`

RowgradWarning                   something is right but not as expected (a slow exact path)
"""

from __future__ import annotations

from typing import Any


class RowgradError(Exception):
    """Base of every error that rowgrad raises on purpose."""


class GraphError(RowgradError, ValueError):
    """The losses, or the graph behind them, cannot be read."""


class NotAVectorError(GraphError):
    """The losses are not a vector with one entry per example."""


class NoGraphError(GraphError):
    """The losses have no computational graph."""


class FreedGraphError(GraphError):
    """The graph's saved tensors were freed by an earlier backward pass."""


class OpaqueGraphError(GraphError):
    """A node of the graph hides what is needed to separate the examples."""


class ParameterError(RowgradError, ValueError):
    """A tensor passed as a parameter cannot have rows."""


class HookedParameterError(ParameterError):
    """A tensor hook on a parameter may change the gradient that rows describe."""


class ForwardModeError(RowgradError, NotImplementedError):
    """Part of a forward pass cannot carry tangents along."""


class IndependenceError(RowgradError, ValueError):
    """Examples are mixed where independent examples are required."""


class NonFiniteError(RowgradError, ArithmeticError):
    """A loss, or a derivative of it, holds inf or nan."""


class InputError(RowgradError, ValueError):
    """A file, a column or an option given by the user cannot be used."""


class DivergedError(InputError):
    """A training ended in losses that are not finite: its options do not suit the data.

    `fitted` is what came of the epochs before, a `rowgrad.training.fit.Fitted`; None if there was none.
    """

    fitted: Any = None


class UserCodeError(InputError):
    """A function given by the user raised; `traceback` holds the user's part of it."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


class WrongGradientError(RowgradError, ArithmeticError):
    """A check found a gradient that is not the derivative of the loss."""


class StaleJacobianError(RowgradError, RuntimeError):
    """A parameter was changed after the Jacobian was made."""


class ConsumedJacobianError(RowgradError, RuntimeError):
    """The factors of this Jacobian were already used up."""


class RowgradWarning(UserWarning):
    """Something is exact but not as fast, or not as usual, as expected."""
