"""Rows of the token table."""

import torch


def embedding(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids [n] int64, table [vocab, h] -> [n, h] in the table's dtype."""
    return table[ids]
