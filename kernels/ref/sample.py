"""Draw the next token of each row."""

import torch

from aiollm.kernels.batch import Sampled, Sampling
from aiollm.kernels.ref.logprobs import logprobs
from aiollm.kernels.ref.random import uniform


def sample(logits: torch.Tensor, sampling: Sampling) -> Sampled:
    """logits [r, vocab] float32 -> Sampled. Each row's result is a function of that row alone.

    In this order: bias is added; penalties; temperature 0 takes the argmax (the lowest id among equals); else
    temperature, top_k, top_p over what top_k left, min_p relative to the likeliest token; one uniform number of
    (seed, length) is inverted through the cumulative distribution of the kept tokens in vocabulary order. Among equal
    logits top_k and top_p keep the lower ids. Reported logprobs are those of the unprocessed logits. The token is -1,
    and its logprob meaningless, where the logits hold NaN or +inf or the processed ones leave no token possible.
    """
    processed = penalize(add_bias(logits, sampling), sampling)
    peak = processed.amax(-1)
    tokens = processed.argmax(-1)
    if sampling.any_random:
        drawn = _draw(processed - peak[:, None], sampling)
        tokens = torch.where(sampling.temperature > 0, drawn, tokens)
    top = logprobs(logits, tokens, sampling.top_n)
    return Sampled(torch.where(peak.isfinite(), tokens, -1), *top)


def add_bias(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Add each bias entry to its logit; entries for the same token add up. Returns a new tensor."""
    return logits.index_put((sampling.bias_index, sampling.bias_ids), sampling.bias_values, accumulate=True)


def penalize(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Repetition (Keskar et al., 2019) over all known tokens, then frequency and presence over the generated ones."""
    if not sampling.any_penalty:
        return logits
    vocab = logits.shape[1]
    history = sampling.tokens[sampling.rows].long()  # [r, max_length]
    position = torch.arange(history.shape[1], device=logits.device)
    known = (position < sampling.lengths[:, None]) & (history >= 0) & (history < vocab)
    generated = known & (position >= sampling.prompt_lengths[:, None])
    history = history.where(known, 0)
    zeros = torch.zeros_like(logits)
    seen = zeros.scatter_add(1, history, known.float()) > 0
    counts = zeros.scatter_add(1, history, generated.float())
    repetition = sampling.repetition[:, None]
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - sampling.frequency[:, None] * counts - sampling.presence[:, None] * (counts > 0)


def _draw(shifted: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """shifted [r, vocab]: processed logits less their largest -> tokens [r]. Rows of temperature 0 get any token."""
    temperature = sampling.temperature.where(sampling.temperature > 0, 1.0)
    weights = (shifted / temperature[:, None]).exp().nan_to_num(0.0)  # relative to the likeliest token's
    kept = weights.where(_kept(weights, sampling), 0.0)
    cumulative = kept.cumsum(-1, dtype=torch.float64)
    target = uniform(sampling.seeds, sampling.lengths)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)
    return drawn.squeeze(1).clamp(max=shifted.shape[1] - 1)  # a row without a finite logit has no mass to find


def _kept(weights: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Which tokens top_k, top_p and min_p leave: bool [r, vocab]."""
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(weights.shape[1], device=weights.device)
    kept = (sampling.top_k[:, None] == 0) | (rank < sampling.top_k[:, None])
    mass = ordered.where(kept, 0.0).cumsum(-1, dtype=torch.float64)
    kept &= mass - ordered < sampling.top_p[:, None] * mass[:, -1:]  # the mass before this token is too small
    kept &= ordered >= sampling.min_p[:, None]
    return torch.zeros_like(kept).scatter(1, ids, kept)
