"""Optimizers that PyTorch lacks."""

from rowgrad.optim.conjugate import ConjugateGradient
from rowgrad.optim.gauss_newton import GaussNewton
from rowgrad.optim.newton import Newton
from rowgrad.optim.quasi_newton import BFGS, LBFGS

__all__ = ["BFGS", "LBFGS", "ConjugateGradient", "GaussNewton", "Newton"]
