"""How much KV memory a set of rows will need at its worst moment.

The peak formula of the Past-Future scheduler (Gong et al., ASPLOS 2025, arXiv 2507.10150): sort rows by the tokens
they still have to generate; just before row i finishes, rows 1..i are alive and each has grown by b_i.
"""

import numpy as np
from numpy.typing import NDArray


def peak(held: NDArray[np.int64], remaining: NDArray[np.int64]) -> int:
    """max_i (i * b_i + sum_{j <= i} a_j), rows sorted by b descending; a = tokens held, b = tokens to come."""
    if not len(held):
        return 0
    order = np.argsort(-remaining, kind="stable")
    alive = np.arange(1, len(held) + 1)
    return int((alive * remaining[order] + np.cumsum(held[order])).max())
