"""What crosses the border between the server and a worker: two tagged unions, msgpack, no pickle.

Rows travel as packed columns (columns.py). The server numbers its `Update`s from 1 in each epoch; a worker applies
them in that order, and one iteration takes updates up to and including the first that carries chunks. So whatever an
update frees may be given away by the next one, and chunks run first in, first out.
"""

import msgspec

from aiollm.wire.columns import Runs
from aiollm.wire.sampling import SamplingParams
from aiollm.wire.vocabulary import Vocabulary

MOST_CREDIT = 64  # slots ahead of the position of a row that decodes


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to know before it loads a model. Sizes are tokens unless a name says bytes."""

    folder: str
    load_format: str = "auto"
    data_type: str = "auto"
    device: str = "cpu"
    rank: int = 0
    ranks: int = 1
    rendezvous: str = ""
    """Path of the file through which the ranks of a group meet."""
    rows: int = 64
    """Requests that run at once."""
    slots: int = 0
    """Tokens that the KV pool holds in all layers; 0 measures what fits."""
    mem_fraction: float = 0.9
    max_length: int = 0
    """Longest sequence, prompt and output together; 0 takes the smaller of the model's context and the pool."""
    again: bool = False
    """Whether these two are those of a worker before: updates name its slots, whatever memory is free meanwhile."""
    chunk_budget: int = 2048
    """Largest number of prompt tokens in one iteration."""
    graphs: bool = True
    """Whether steps are captured as graphs where the device has them."""
    threads: int = 0
    """CPU threads of the maths library; 0 takes what the machine has, shared among the ranks."""


class Setup(msgspec.Struct, frozen=True, tag="setup"):
    """First message to a worker."""

    epoch: int
    settings: WorkerSettings
    vocabulary: Vocabulary | None = None
    """Without it no grammar can be followed."""


class Admit(msgspec.Struct, frozen=True, array_like=True):
    """A row begins a life. Its tokens and slots come as runs of the same or later updates."""

    row: int
    generation: int
    prompt_length: int
    """Tokens of the request itself; tokens beyond were generated before a pause."""
    tokens: int
    """Tokens known now: the row decodes once these are computed."""
    limit: int
    """Total length at which the row ends, prompt and output together."""
    sampling: SamplingParams


class Update(msgspec.Struct, frozen=True, tag="update", kw_only=True):
    """One step of the server's ordered stream; fields are applied in the order they stand here."""

    number: int
    retire: bytes = b""
    """Rows whose life ends."""
    admit: list[Admit] = []
    slots: Runs = Runs()
    """KV slots by (row, position), in a table for each group of layers: cached prefixes, chunks, and credit for
    decoding."""
    tokens: Runs = Runs()
    """Token ids by (row, position)."""
    chunk_rows: bytes = b""
    chunk_starts: bytes = b""
    chunk_counts: bytes = b""
    """Prompt tokens [start, start + count) of a row, computed in the iteration that applies this update."""


class Profile(msgspec.Struct, frozen=True, tag="profile"):
    """Profile so many iterations, and answer with `Profiled`; 0 ends the profile that runs, if one does."""

    steps: int
    with_stack: bool = False


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Finish what was launched and leave."""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress before Ready; fraction is in [0, 1]."""

    phase: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag="ready", kw_only=True):
    """The worker serves. `budget` lists (what, bytes) of the memory it measured."""

    slots: int
    """Tokens that the KV pool holds in all layers."""
    max_length: int
    vocabulary: int
    hidden: int = 0
    """Numbers of a hidden state."""
    architecture: str
    data_type: str
    budget: list[tuple[str, int]]
    seconds: list[tuple[str, float]]
    unread: list[str] = []
    """Keys of config.json that nobody understood."""
    scores: bool = False
    """A reward model: the logprob of the one token that it draws is the score of the prompt."""
    window: int = 0
    """Positions that a query sees in layers with a window, its own included."""
    windowed: int = 0
    """Groups of such layers: a token takes a slot for each of them while it is seen, and one for ever."""
    score_token: int = -1
    """Must be the last one of such a prompt; -1 where none has to."""


class Header(msgspec.Struct, frozen=True, array_like=True):
    """Rule C: stands before the results of every iteration."""

    epoch: int
    iteration: int
    turn: int
    """Turn of the baton that launched it; a turn may launch nothing. Replays keep to it."""
    applied: int
    """Last update applied before this iteration; its arena space is free."""
    device_us: int
    """Time the device worked on this iteration."""
    idle_us: int
    """Time the device had nothing to do before this iteration, or in the midst of it while masks were made (rule J)."""
    stalled: bytes
    """Rows that could not run for want of credit."""
    waiting: bytes = b""
    """Rows that could not draw because their grammars were being built."""
    held: bytes = b""
    """Rows that were to draw and did not: their grammars must be built again first."""


HINT_NONE, HINT_STOP, HINT_LENGTH = 0, 1, 2


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of a row's prompt tokens at positions start, start + 1, ...; columns of n and n * top values."""

    row: int
    generation: int
    start: int
    logprobs: bytes
    ranks: bytes
    """How many tokens are at least as likely, itself included."""
    top_ids: bytes
    top_logprobs: bytes


class Reason(msgspec.Struct, frozen=True, array_like=True):
    """Why no token could be drawn for a row."""

    text: str
    asked: bool = False
    """Whether that is what the request asks for: nothing has failed."""


class Result(msgspec.Struct, frozen=True, tag="result", kw_only=True):
    """What one iteration drew. A row may occur several times, in token order, or not at all."""

    header: Header
    rows: bytes = b""
    generations: bytes = b""
    tokens: bytes = b""
    """-1: the logits of this row were not finite."""
    logprobs: bytes = b""
    hints: bytes = b""
    """One byte a row: HINT_STOP and HINT_LENGTH say that the row is idle; the server is the judge."""
    top: int = 0
    """Alternatives per row in the next two columns."""
    top_ids: bytes = b""
    top_logprobs: bytes = b""
    prompts: list[PromptLogprobs] = []
    reasons: dict[int, Reason] = {}
    """By row, where it is not the logits' fault."""
    hidden_at: bytes = b""
    """Places in the columns above of the rows that embed."""
    hidden: bytes = b""
    """Their hidden states behind the final norm, float32, one after the other."""


class Failed(msgspec.Struct, frozen=True, tag="failed", kw_only=True):
    """An iteration failed: its rows got no token, and the chunks it should have computed hold garbage."""

    header: Header
    rows: bytes
    generations: bytes
    starts: bytes
    """First position that the iteration should have computed, per row."""
    counts: bytes
    error: str


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """A worker that waits for grammars and can compute nothing until they are built says so now and then."""


class Profiled(msgspec.Struct, frozen=True, tag="profiled"):
    """A Chrome trace, gzipped, or why there is none."""

    trace: bytes
    error: str = ""


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The worker gives up: what happened and what the user can change."""

    error: str


ToWorker = Setup | Update | Profile | Stop
FromWorker = Loading | Ready | Result | Failed | Alive | Profiled | Fatal

encoder = msgspec.msgpack.Encoder()
to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)
from_worker_decoder = msgspec.msgpack.Decoder(FromWorker)
