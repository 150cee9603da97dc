"""What one iteration costs the device, from what it computes; fitted to measured iterations.

    us = (floor^p + (tokens * token)^p)^(1/p) + kv * kv_token + pairs * pair

`floor` is the time to read the weights, `token` that of a token where the arithmetic is the limit, and `p` how sharply
one gives way to the other; `kv` are the cached tokens that decoding rows read, `pairs` the (query, key) pairs of prompt
tokens. `idle` is the time between two iterations.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from simulator import DRIFT, Replica, Uneven

from aiollm.wire.messages import Result, Update, from_worker_decoder, to_worker_decoder
from aiollm.workers.replay import FROM_WORKER, read

FOLDER = Path(__file__).parent / "results" / "costs"
WAITING = 50_000  # us without an iteration: there was nothing to do
MEDIAN = 0.6745  # of what is normally distributed, in standard deviations


class Work(NamedTuple):
    """What one iteration computes."""

    decode: int
    """Rows that decode one token."""
    kv: int
    """Tokens that these rows read, their own included."""
    chunk: int
    """Prompt tokens."""
    pairs: int


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds; see the module."""

    what: str
    """Model, machine, and where the figures come from."""
    floor: float
    token: float
    power: float
    kv_token: float
    pair: float
    idle: float = 0.0
    error: float = 0.0
    """Median relative error over the iterations of the fit."""

    def us(self, work: Work) -> float:
        """Microseconds of one iteration."""
        tokens = (work.decode + work.chunk) * self.token
        linear = (self.floor**self.power + tokens**self.power) ** (1 / self.power)
        return float(linear + work.kv * self.kv_token + work.pairs * self.pair)


def load(name: str) -> Costs:
    """`name` is a file, or the name of one in tools/results/costs."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    return msgspec.json.decode(path.read_bytes(), type=Costs)


Measured = tuple[Work, float, float]  # and its device us, and the idle us before it


def iterations(path: Path) -> Iterator[Measured]:
    """The iterations of a file that `--record` wrote, or of a result of `aiollm bench static`."""
    return _of_bench(path) if path.suffix == ".json" else of_record(path)


def fit(measured: Iterable[Measured], what: str) -> Costs:
    rows = list(measured)
    if len(rows) < 6:
        raise SystemExit(f"{len(rows)} iterations with a device time are too few for a fit")
    from scipy.optimize import least_squares

    works = np.array([work for work, _, _ in rows], float)
    took = np.array([us for _, us, _ in rows])
    tokens, kv, pairs = works[:, 0] + works[:, 2], works[:, 1], works[:, 3]

    def predicted(x: np.ndarray) -> np.ndarray:
        floor, token, power, kv_token, pair = np.exp(x)
        linear = (floor**power + (tokens * token) ** power) ** (1 / power)
        found: np.ndarray = linear + kv * kv_token + pairs * pair
        return found

    start = np.log([took.min(), took.max() / max(1.0, tokens.max()), 2.0, 0.01, 0.001])
    low, high = np.log([1, 1e-3, 1.0, 1e-6, 1e-8]), np.log([1e8, 1e6, 8.0, 1e4, 1e3])
    found = least_squares(
        lambda x: np.log(predicted(x) / took), start, bounds=(low, high), loss="soft_l1", f_scale=0.05
    )
    floor, token, power, kv_token, pair = np.exp(found.x).tolist()
    busy = [idle for _, _, idle in rows if idle < WAITING]
    return Costs(
        what=what, floor=floor, token=token, power=power, kv_token=kv_token, pair=pair,
        idle=float(np.median(busy)) if busy else 0.0,
        error=float(np.median(np.abs(predicted(found.x) / took - 1))),
    )  # fmt: skip


def unevenness(costs: Costs, measured: Iterable[Measured]) -> Uneven:
    """How the iterations of one run lie about the model."""
    rows = [(costs.us(work), us, idle) for work, us, idle in measured]
    model, took, idle = np.array(rows).T
    idle[idle >= WAITING] = costs.idle
    spans = ((np.cumsum(took + idle) - took) / 1e6 / DRIFT).astype(int)
    drift = np.bincount(spans, took + idle) / np.maximum(1.0, np.bincount(spans, model + costs.idle))
    drift[drift == 0] = 1.0
    off = np.log(took / (model * drift[spans]))
    return Uneven(drift.round(3).tolist(), round(float(np.median(np.abs(off - np.median(off)))) / MEDIAN, 4))


def of_record(path: Path) -> Iterator[Measured]:
    """Each recorded iteration that has a device time."""
    replica: Replica | None = None
    updates: list[Update] = []
    for direction, body in read(path):
        if direction == FROM_WORKER:
            message = from_worker_decoder.decode(body)
            if replica is None or not isinstance(message, Result):
                continue
            chunks = []
            while updates and updates[0].number <= message.header.applied:
                chunks += replica.apply(updates.pop(0))
            work = replica.launch(chunks, message)
            if message.header.device_us:
                yield work, float(message.header.device_us), float(message.header.idle_us)
        else:
            message = to_worker_decoder.decode(body)
            if isinstance(message, Update):
                updates.append(message)
            elif replica is None and hasattr(message, "settings"):
                replica = Replica(message.settings.rows)


def _of_bench(path: Path) -> Iterator[Measured]:
    for step in json.loads(path.read_bytes())["steps"]:
        kind, rows, _, length = step["workload"].split()
        count, each = int(rows), int(length)
        work = Work(count, count * each, 0, 0) if kind == "decode" else Work(0, 0, count * each, count * each**2 // 2)
        yield work, float(step["graph_us"]), 0.0


def as_json(costs: Costs) -> str:
    """Four digits are what a fit is good for."""
    rounded: dict[str, Any] = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in msgspec.structs.asdict(costs).items()
    }
    return json.dumps(rounded, indent=1) + "\n"


def save(costs: Costs, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(costs))
