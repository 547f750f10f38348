"""The table of rules: for a kind of node and one of its inputs, the rows in factors instead of one by one.

What no rule takes goes the general path, exactly. The table is data; the rules live in the modules of their family.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from rowgrad.rows.convolution import convolution_weight
from rowgrad.rows.linear import matrix_first, matrix_second
from rowgrad.rows.lookup import bag, embedding, gathered, indexed, selected, taken
from rowgrad.rows.normalization import (
    batch_scale,
    channel_shift,
    group_scale,
    layer_scale,
    layer_shift,
    repeated,
    rms_scale,
)
from rowgrad.rows.products import (
    batched,
    bilinear,
    dot,
    grouped,
    matrix_of_vector,
    outer,
    summed_first,
    summed_second,
    vector,
)
from rowgrad.rows.recurrent import lstm_parameter
from rowgrad.rows.site import Rule, elementwise, factor, summand

# fmt: off
# (node kind, slot): rule                                             # what it is          source
_TABLE: dict[tuple[str, int], Rule] = {
    ("MmBackward0", 1):       matrix_second,                            # z = h W             Goodfellow 2015, section 4
    ("MmBackward0", 0):       matrix_first,                             # z = W h
    ("AddmmBackward0", 0):    partial(summand, scale="beta"),           # bias of a linear layer
    ("AddmmBackward0", 1):    partial(matrix_first, saved="mat2", scale="alpha"),
    ("AddmmBackward0", 2):    partial(matrix_second, saved="mat1", scale="alpha"),
    ("BmmBackward0", 0):      partial(batched, weight_first=True, saved="mat2"),
    ("BmmBackward0", 1):      partial(batched, weight_first=False, saved="self"),
    ("BaddbmmBackward0", 0):  partial(summand, scale="beta"),
    ("BaddbmmBackward0", 1):  partial(batched, weight_first=True, saved="batch2", scale="alpha"),
    ("BaddbmmBackward0", 2):  partial(batched, weight_first=False, saved="batch1", scale="alpha"),
    ("AddBackward0", 0):      summand,                                  # bias, position embedding, shift
    ("AddBackward0", 1):      partial(summand, scale="alpha"),
    ("MulBackward0", 0):      factor,                                   # scale, temperature, gate
    ("MulBackward0", 1):      factor,
    ("SubBackward0", 0):      summand,
    ("SubBackward0", 1):      partial(summand, scale="alpha", sign=-1),
    ("ExpandBackward0", 0):   summand,                                  # class token, learned queries
    ("RepeatBackward0", 0):   repeated,                                 # instance norm, prompts
    ("MvBackward0", 0):              matrix_of_vector,
    ("MvBackward0", 1):              vector,
    ("AddmvBackward0", 0):           partial(summand, scale="beta"),
    ("AddmvBackward0", 1):           partial(matrix_of_vector, scale="alpha"),
    ("AddmvBackward0", 2):           partial(vector, saved="mat", scale="alpha"),
    ("DotBackward0", 0):             partial(dot, saved="tensor"),
    ("DotBackward0", 1):             partial(dot, saved="self"),
    ("VdotBackward0", 0):            partial(dot, saved="other"),
    ("VdotBackward0", 1):            partial(dot, saved="self"),
    ("AddrBackward0", 0):            partial(summand, scale="beta"),
    ("AddrBackward0", 1):            partial(outer, saved="vec2", dim=0),
    ("AddrBackward0", 2):            partial(outer, saved="vec1", dim=1),
    ("AddbmmBackward0", 0):          partial(summand, scale="beta"),
    ("AddbmmBackward0", 1):          summed_first,
    ("AddbmmBackward0", 2):          summed_second,
    ("TrilinearBackward0", 1):       bilinear,
    ("GroupedMmBackward0", 0):       partial(grouped, weight_first=True),
    ("GroupedMmBackward0", 1):       partial(grouped, weight_first=False),  # experts
    ("MkldnnRnnLayerBackward0", 1):  partial(lstm_parameter, part="input"),
    ("MkldnnRnnLayerBackward0", 2):  partial(lstm_parameter, part="hidden"),
    ("MkldnnRnnLayerBackward0", 3):  partial(lstm_parameter, part="bias"),
    ("MkldnnRnnLayerBackward0", 4):  partial(lstm_parameter, part="bias"),
    ("ConvolutionBackward0", 1):     convolution_weight,
    ("ConvolutionBackward0", 2):     channel_shift,
    ("NativeLayerNormBackward0", 1): layer_scale,
    ("NativeLayerNormBackward0", 2): layer_shift,
    ("FusedRmsNormBackward0", 1):    rms_scale,
    ("NativeGroupNormBackward0", 1): group_scale,
    ("NativeGroupNormBackward0", 2): channel_shift,
    ("NativeBatchNormBackward0", 1): batch_scale,
    ("NativeBatchNormBackward0", 2): channel_shift,
    ("CudnnBatchNormBackward0", 1):  batch_scale,
    ("CudnnBatchNormBackward0", 2):  channel_shift,
    ("EmbeddingBackward0", 0):       embedding,
    ("EmbeddingBagBackward0", 0):    bag,
    ("IndexBackward0", 0):           indexed,
    ("IndexSelectBackward0", 0):     selected,
    ("GatherBackward0", 0):          gathered,
    ("TakeBackward0", 0):            taken,
}
# fmt: on

_BROADCASTING = {
    "Rsub": 2, "Div": 2, "Addcmul": 3, "Addcdiv": 3, "Where": 3, "Maximum": 2, "Minimum": 2,
    "Lerp": 3, "Pow": 2, "PreluKernel": 2, "Atan2": 2,
}  # fmt: skip
_TABLE |= {
    (f"{name}Backward{i}", slot): elementwise
    for name, n_slots in _BROADCASTING.items()
    for slot in range(n_slots)
    for i in range(2)
}


class RuleTable(dict[tuple[str, int], Rule]):
    """The rules by (node kind, slot); `RULES | {...}` adds some."""

    def __repr__(self) -> str:
        return f"RULES ({len(self)} rules)"


RULES: Mapping[tuple[str, int], Rule] = RuleTable(_TABLE)
