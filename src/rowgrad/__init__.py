"""rowgrad: the gradients of neural networks, seen whole and example by example."""

from rowgrad.checking.during import GradientChecks
from rowgrad.checking.gradients import check_gradients
from rowgrad.checking.rows import check_rows
from rowgrad.curvature import critical_point, hvp, quadratic_model, spectrum
from rowgrad.diagnosis.examine import diagnose
from rowgrad.diagnosis.findings import Finding
from rowgrad.diagnosis.limits import Limits
from rowgrad.diagnosis.monitor import Monitor
from rowgrad.diagnosis.result import Diagnosis
from rowgrad.errors import RowgradError, RowgradWarning
from rowgrad.forward.along import jvp
from rowgrad.graph.flow import Flow
from rowgrad.graph.graph import Graph
from rowgrad.graph.scopes import trace
from rowgrad.rows.build import grad_norms, grad_rows, jacobian
from rowgrad.rows.matrix import Jacobian
from rowgrad.rows.objective import clip_weights, clipped_loss, per_example
from rowgrad.rows.rules import RULES
from rowgrad.uses.audit import Audit
from rowgrad.uses.clipping import RunningQuantile
from rowgrad.uses.draws import Weighted
from rowgrad.uses.indexed import Indexed
from rowgrad.uses.noise import NoiseScale
from rowgrad.uses.sampling import NormSampler

__version__ = "0.1.0"

__all__ = [
    "RULES",
    "Audit",
    "Diagnosis",
    "Finding",
    "Flow",
    "GradientChecks",
    "Graph",
    "Indexed",
    "Jacobian",
    "Limits",
    "Monitor",
    "NoiseScale",
    "NormSampler",
    "RowgradError",
    "RowgradWarning",
    "RunningQuantile",
    "Weighted",
    "check_gradients",
    "check_rows",
    "clip_weights",
    "clipped_loss",
    "critical_point",
    "diagnose",
    "grad_norms",
    "grad_rows",
    "hvp",
    "jacobian",
    "jvp",
    "per_example",
    "quadratic_model",
    "spectrum",
    "trace",
]
