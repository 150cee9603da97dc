"""Running rows and newcomers as admission sees them, written by hand."""

import numpy as np

from aiollm.engine.admission import Newcomer, View


def view(held=(), done=(), cap=(), certain=None, slots=100, shared=0, delay=None, known=None):
    count = len(held)
    columns = (np.array(column, np.int64) for column in (held, done, known or held, cap))
    held, done, known, cap = columns
    return View(
        held, done, known, cap, np.zeros(count, np.int64),
        np.array(certain if certain is not None else [False] * count, bool),
        np.array(delay or [0] * count, np.int64), shared, shared + int(held.sum()), slots,
    )  # fmt: skip


def new(held, cap, certain=False, delay=0, shared=0):
    return Newcomer(held, 0, held, cap, 0, certain, delay, shared)
