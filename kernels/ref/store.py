"""The drawn tokens appended to their rows."""

import torch


def store(tokens: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor, drawn: torch.Tensor) -> None:
    """Write drawn[i] to tokens[rows[i], lengths[i]]; a drawn -1 (no finite logits) is written as 0.

    tokens [max_rows, max_length] int32, in place; rows, lengths, drawn [r] int64. Several entries may name one place of
    the last row, which pads; its content is then arbitrary.
    """
    tokens[rows, lengths] = drawn.clamp(min=0).to(tokens.dtype)
