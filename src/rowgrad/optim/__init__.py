"""Optimizers of first and second order that PyTorch lacks, and those it has by name."""

from rowgrad.optim.clipping import GradientClip
from rowgrad.optim.conjugate import ConjugateGradient
from rowgrad.optim.factory import make
from rowgrad.optim.first_order import AdaGrad, Momentum, RMSProp
from rowgrad.optim.gauss_newton import GaussNewton
from rowgrad.optim.newton import Newton
from rowgrad.optim.quasi_newton import BFGS, LBFGS
from rowgrad.optim.rates import decay, weight_groups

__all__ = [
    "BFGS",
    "LBFGS",
    "AdaGrad",
    "ConjugateGradient",
    "GaussNewton",
    "GradientClip",
    "Momentum",
    "Newton",
    "RMSProp",
    "decay",
    "make",
    "weight_groups",
]
