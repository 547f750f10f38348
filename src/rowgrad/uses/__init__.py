"""What rows are for: auditing data, clipping, the noise scale of a batch, sampling by importance."""

from rowgrad.uses.audit import Audit
from rowgrad.uses.clipping import RunningQuantile
from rowgrad.uses.draws import Weighted
from rowgrad.uses.indexed import Indexed
from rowgrad.uses.noise import NoiseScale
from rowgrad.uses.pool import PoolSampler, output_norms
from rowgrad.uses.sampling import NormSampler
from rowgrad.uses.telemetry import batch_statistics

__all__ = [
    "Audit",
    "Indexed",
    "NoiseScale",
    "NormSampler",
    "PoolSampler",
    "RunningQuantile",
    "Weighted",
    "batch_statistics",
    "output_norms",
]
