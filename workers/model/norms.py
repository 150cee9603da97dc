"""A decoder's norms out of its parameters."""

from aiollm.kernels.variants import Norm
from aiollm.kernels.weight import Weights
from aiollm.workers.model.spec import DecoderSpec


def norm_of(spec: DecoderSpec, weights: Weights, name: str, scale: float = 1.0) -> Norm:
    """The norm whose weight is `name`; what it gives is multiplied by `scale`.

    An offset and a scale go into the weight, in fp32: they cost nothing in the forward.
    """
    weight, bias = weights[name], weights.get(name + "_bias")
    if spec.unit_offset:
        weight = weight.float() + 1
    if scale != 1:
        weight = weight.float() * scale
        bias = None if bias is None else bias.float() * scale
    return Norm(weight, spec.norm_eps, bias, spec.centered)
