"""Draw the next token of each row on a CPU; the contract is ref/sample.py, whose tokens these are."""

import numpy as np
import torch

from aiollm.kernels.batch import Sampled, Sampling
from aiollm.kernels.ref.logprobs import logprobs
from aiollm.kernels.ref.random import uniform
from aiollm.kernels.ref.sample import add_bias, penalize


def sample(logits: torch.Tensor, sampling: Sampling) -> Sampled:
    """logits [r, vocab] float32 -> Sampled. Rows pay for what they ask: a greedy one for an argmax."""
    processed = add_bias(logits, sampling) if len(sampling.bias_index) else logits
    if sampling.any_penalty:
        processed = _penalize(processed, sampling)
    tokens = processed.argmax(-1)
    peak = processed.gather(1, tokens[:, None]).squeeze(1)
    possible = peak.isfinite()
    if sampling.any_random:
        chosen = ((sampling.temperature > 0) & possible).nonzero().squeeze(1)
        numbers = uniform(sampling.seeds, sampling.lengths)
        knobs = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, numbers)
        columns = [knob[chosen].tolist() for knob in knobs]
        for row, temperature, top_k, top_p, min_p, number in zip(chosen.tolist(), *columns, strict=True):
            weights = ((processed[row] - peak[row]) / temperature).exp()
            tokens[row : row + 1] = _draw(weights, top_k, top_p, min_p, number)
    top = logprobs(logits, tokens, sampling.top_n)
    return Sampled(torch.where(possible, tokens, -1), *top)


def _penalize(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The reference's penalties, for the rows that have any, over the longest history among them."""
    on = (sampling.presence != 0) | (sampling.frequency != 0) | (sampling.repetition != 1)
    chosen = on.nonzero().squeeze(1)
    names = ("rows", "presence", "frequency", "repetition", "prompt_lengths", "lengths")
    part = sampling._replace(**{name: getattr(sampling, name)[chosen] for name in names})
    longest = int(part.lengths.max()) if len(chosen) else 0
    part = part._replace(tokens=sampling.tokens[:, :longest])
    return logits.index_copy(0, chosen, penalize(logits[chosen], part))


def _draw(weights: torch.Tensor, top_k: int, top_p: float, min_p: float, number: float) -> torch.Tensor:
    """weights [vocab]: probabilities relative to the largest; number in [0, 1) -> token, [1]."""
    if top_k or top_p < 1:
        weights = _likeliest(weights, top_k, top_p)
    if min_p:
        weights = weights.where(weights >= min_p, 0.0)
    cumulative = weights.cumsum(0, dtype=torch.float64)
    return torch.searchsorted(cumulative, number * cumulative[-1:], right=True)


def _likeliest(weights: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The weights that top_k and top_p leave; zero elsewhere. Only values are sorted: the last one kept is the cut."""
    # numpy sorts 49,152 values in 0.09 ms, torch in 3.1 ms (AVX-512, one thread).
    ordered = torch.from_numpy(np.sort(weights.numpy())).flip(0)
    if top_k:
        ordered = ordered[:top_k]
    if top_p < 1:
        mass = ordered.cumsum(0, dtype=torch.float64)
        ordered = ordered[: int((mass - ordered < top_p * mass[-1]).sum())]
    cut = ordered[-1]
    ties = int((ordered == cut).sum())  # of the tokens that lie on the cut, the lowest ids are kept
    kept = weights.where(weights > cut, 0.0)
    return kept.index_fill(0, (weights == cut).nonzero().squeeze(1)[:ties], cut)
