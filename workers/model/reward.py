"""What a reward model has in place of an output layer: one number for a whole text, read at its last token."""

import torch
from torch.nn.functional import linear

from aiollm.kernels.batch import Sampled, Sampling
from aiollm.kernels.ops import Ops
from aiollm.kernels.variants import Norm
from aiollm.kernels.weight import Weights
from aiollm.workers.model.spec import DecoderSpec


class Reward:
    """score(norm(x)), or score(relu(inner(norm(x)))) with biases."""

    def __init__(self, spec: DecoderSpec, weights: Weights, norm: Norm, ops: Ops) -> None:
        names = ("score_inner", "score_inner_bias") if spec.reward == "mlp" else ()
        self._inner = [weights[name] for name in names]
        self._score = [weights["score"], weights.get("score_bias")]
        self._norm = norm
        self._ops = ops

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [r, hidden] -> [r, 1] in its dtype."""
        x = self._ops.norm(hidden, self._norm)
        if self._inner:
            x = linear(x, *self._inner).relu_()
        return linear(x, *self._score)


def read_score(scores: torch.Tensor, sampling: Sampling) -> Sampled:
    """`Ops.sample` of a reward model: scores [r, 1] -> token 0 for each sequence, with the score as its logprob.

    So a score travels as a drawn token does. As there, the token is -1 where the score is not finite.
    """
    score = scores.float()[:, 0]
    tokens = torch.where(score.isfinite(), 0, -1)
    nothing = score.new_empty(len(score), sampling.top_n)
    return Sampled(tokens, score, nothing.long(), nothing)
