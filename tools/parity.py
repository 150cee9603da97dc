"""Holds the server's greedy tokens and logprobs against transformers, in fp32, in every mode of serving.

    python tools/parity.py --save tools/results/parity.json

Each mode is a real server process over the demo model (or --model_dir). Where the tokens part, the reference's two
best logits must lie within 1e-3 of each other; such a case is listed, any other one fails.
"""

import argparse
import json
import os
import platform
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from serving import Server

from aiollm.config import CHUNK
from aiollm.hub.resolve import resolve
from aiollm.text.tokenizer import Tokenizer
from aiollm.workers.runner import LOGIT_ROWS

TIE = 1e-3  # logits closer than this may fall either way
LOGPROB = 1e-3
MODES = ("plain", "chunks", "paused", "policies", "killed", "tp")
Tokens = list[int]


class Reference(NamedTuple):
    """What transformers says of one prompt."""

    prompt: Tokens
    tokens: Tokens
    logprobs: list[float]
    margins: list[float]
    """Between the two best logits of each step."""
    prompt_logprobs: list[float]
    """Of the prompt's second token and those after it."""


class Answer(NamedTuple):
    tokens: Tokens
    logprobs: list[float]
    cached: int


def make_prompts(tokenizer: Tokenizer, count: int, longest: int) -> list[Tokens]:
    """Slices of the licence text, of lengths from 1 to `longest` in even ratios, each from another place."""
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    ids = tokenizer.encode(text, False)
    lengths = np.unique(np.geomspace(1, longest, 4 * count).round().astype(int))
    lengths = lengths[np.linspace(0, len(lengths) - 1, count).round().astype(int)]
    starts = np.random.default_rng(7).integers(0, max(1, len(ids) - longest), count)
    return [ids[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]


def reference(model: Any, prompt: Tokens, steps: int, eos: frozenset[int]) -> Reference:
    """Greedy steps of a transformers model, one prompt alone."""
    with torch.inference_mode():
        output = model(torch.tensor([prompt]), use_cache=True)
        known = torch.log_softmax(output.logits[0, :-1].double(), -1)
        prompt_logprobs = known.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        tokens: Tokens = []
        logprobs, margins = [], []
        while True:
            logits = output.logits[0, -1].double()
            best, second = logits.topk(2).values.tolist()
            token = int(logits.argmax())
            tokens.append(token)
            logprobs.append(float(torch.log_softmax(logits, -1)[token]))
            margins.append(best - second)
            if len(tokens) == steps or token in eos:
                return Reference(prompt, tokens, logprobs, margins, prompt_logprobs)
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)


def body(prompt: Tokens | list[Tokens], steps: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": steps, "temperature": 0, "logprobs": 0, "return_token_ids": True}


def ask(server: Server, prompt: Tokens, steps: int) -> Answer:
    """One request, not streamed."""
    (answer,) = answers(server.post("/v1/completions", body(prompt, steps)))
    return answer


def answers(found: dict[str, Any]) -> list[Answer]:
    """Those of a response, one for each prompt, with what was found in the cache for all of them."""
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return [Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], cached) for choice in found["choices"]]


def ask_streamed(
    server: Server, prompt: Tokens, steps: int, on_token: Callable[[int], None] = lambda n: None
) -> Answer:
    """The same, streamed; `on_token` hears how many tokens have come."""
    data = json.dumps({**body(prompt, steps), "stream": True}).encode()
    request = urllib.request.Request(server.url + "/v1/completions", data, {"Content-Type": "application/json"})
    tokens: Tokens = []
    logprobs: list[float] = []
    with urllib.request.urlopen(request, timeout=600) as lines:
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            for choice in event["choices"]:
                tokens += choice.get("token_ids") or []
                logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
            on_token(len(tokens))
    return Answer(tokens, logprobs, 0)


class Verdict(NamedTuple):
    """How a mode compares: `ties` lists where tokens part at a near tie, `wrong` where they part without one."""

    compared: int
    ties: list[str]
    wrong: list[str]
    logprob_error: float


def compare(references: Sequence[Reference], answers: Sequence[Answer]) -> Verdict:
    ties, wrong, compared, error = [], [], 0, 0.0
    for at, (expected, found) in enumerate(zip(references, answers, strict=True)):
        same = 0
        while same < min(len(expected.tokens), len(found.tokens)) and expected.tokens[same] == found.tokens[same]:
            same += 1
        compared += same
        gaps = np.abs(np.subtract(expected.logprobs[:same], found.logprobs[:same]))
        error = max(error, float(gaps.max(initial=0)))
        if same < len(expected.tokens) or same < len(found.tokens):
            margin = expected.margins[same] if same < len(expected.margins) else float("inf")
            where = f"prompt {at} ({len(expected.prompt)} tokens), output token {same}: margin {margin:.2g}"
            (ties if margin < TIE else wrong).append(where)
    if error > LOGPROB:
        wrong.append(f"logprobs are off by {error:.2g}")
    return Verdict(compared, ties, wrong, error)


class Parity:
    """The references once, then each mode against them."""

    def __init__(self, folder: str, count: int, longest: int, steps: int, device: str = "cpu") -> None:
        self.folder = folder
        self.device = device  # of the server; the references are computed on the CPU
        self.steps = steps
        tokenizer = Tokenizer.load(folder)
        prompts = make_prompts(tokenizer, count, longest)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.vocabulary = model.config.vocab_size
        self.references = [reference(model, prompt, steps, tokenizer.eos_ids) for prompt in prompts]
        self.prompts = prompts

    def server(self, *flags: str) -> Server:
        return Server("--model_dir", self.folder, "--data_type", "fp32", "--device", self.device, *flags)

    def together(self, server: Server, ask: Callable[..., Answer] = ask) -> list[Answer]:
        """All prompts at once."""
        with ThreadPoolExecutor(len(self.prompts)) as pool:
            return list(pool.map(lambda prompt: ask(server, prompt, self.steps), self.prompts))

    def verdict(self, answers: Sequence[Answer]) -> Verdict:
        return compare(self.references, answers)

    def plain(self) -> dict[str, Verdict]:
        """Alone, again with the prefix cached, all at once, and streamed; and echoed logprobs."""
        with self.server("--disable_dynamic_prompt_cache") as server:
            alone = [ask(server, prompt, self.steps) for prompt in self.prompts]
        with self.server() as server:
            batched = self.together(server)
            again = [ask(server, prompt, self.steps) for prompt in self.prompts]
            hits = [answer.cached == len(prompt) - 1 for answer, prompt in zip(again, self.prompts, strict=True)]
            streamed = self.together(server, ask_streamed)
            echoed = self.echoed(server)
        found = {name: self.verdict(answers) for name, answers in
                 {"alone": alone, "batched": batched, "prefix hits": again, "streamed": streamed}.items()}  # fmt: skip
        if not all(hits):
            found["prefix hits"].wrong.append(f"only {sum(hits)} of {len(hits)} prompts came from the cache")
        return found | {"echo": echoed}

    def echoed(self, server: Server) -> Verdict:
        """Prompt logprobs, and the memory they take: the vocabulary's logits exist for a slice of positions only."""
        chunk = [token for expected in self.references for token in expected.prompt][:CHUNK]
        ask(server, chunk[::-1], 1)  # computed at once, which takes memory of its own
        before, error, compared = server.peak_memory(), 0.0, 0
        for expected in self.references:
            request = {**body(expected.prompt, 0), "echo": True}
            found = server.post("/v1/completions", request)["choices"][0]["logprobs"]["token_logprobs"]
            compared += len(found) - 1
            gaps = np.abs(np.subtract(found[1:], expected.prompt_logprobs))
            error = max(error, float(gaps.max(initial=0)))
        grown = (server.peak_memory() - before) >> 20
        wrong = [f"logprobs are off by {error:.2g}"] if error > LOGPROB else []
        # A slice's logits, the temporary values of their log-softmax, and what the allocator keeps of either: 165 MiB
        # were measured for 200 positions, 173 for 1,500, whose logits all at once would take six times that.
        most = (4 * LOGIT_ROWS * self.vocabulary * 4) >> 20
        wrong += [f"memory grew by {grown} MiB, of {most}"] if grown > most else []
        return Verdict(compared, [], wrong, error)

    def chunks(self, size: int) -> Verdict:
        with self.server("--chunked_prefill_size", str(size)) as server:
            return self.verdict(self.together(server))

    def paused(self, *flags: str, policy: str = "aggressive") -> Verdict:
        """A pool so small that running requests must be paused and resumed, under a policy that does."""
        longest = max(len(expected.prompt) for expected in self.references)
        every = sum(len(expected.prompt) for expected in self.references)
        small = ["--max_total_token_num", str(max(longest + self.steps, every // 6)), "--max_queue_tokens", str(every)]
        with self.server(*small, "--schedule_policy", policy, *flags) as server:
            # One request: they have to come at once, or a fast server is done with some before others are there.
            found = self.verdict(answers(server.post("/v1/completions", body(self.prompts, self.steps), 600)))
            if policy == "aggressive" and not server.metric("aiollm_num_preemptions_total"):
                found.wrong.append("no request was paused")
            return found

    def killed(self) -> Verdict:
        """A worker is killed once every answer has begun or a third of all tokens has come."""
        seen: dict[int, int] = {}
        lock, strike = threading.Lock(), threading.Event()
        wanted = sum(len(expected.tokens) for expected in self.references) // 3

        def on_token(at: int, n: int) -> None:
            with lock:
                seen[at] = n
                if sum(seen.values()) >= wanted and not strike.is_set():
                    strike.set()
                    os.kill(server.workers()[-1], signal.SIGKILL)

        with self.server() as server, ThreadPoolExecutor(len(self.prompts)) as pool:
            answers = [
                pool.submit(ask_streamed, server, prompt, self.steps, lambda n, at=at: on_token(at, n))  # type: ignore[misc]
                for at, prompt in enumerate(self.prompts)
            ]
            found = self.verdict([answer.result() for answer in answers])
            if not strike.is_set():
                found.wrong.append("no worker was killed")
            return found

    def parallel(self, tp: int) -> Verdict:
        with self.server("--tp", str(tp)) as server:
            return self.verdict(self.together(server))

    def modes(self, tp: int, chosen: Sequence[str] = MODES) -> Iterator[tuple[str, Verdict]]:
        """Every mode of `chosen`, as it is done."""
        if "plain" in chosen:
            yield from self.plain().items()
        if "chunks" in chosen:
            yield "chunks of 7", self.chunks(7)
            yield "chunks of 64", self.chunks(64)
        if "paused" in chosen:
            yield "paused and resumed", self.paused()
        if "policies" in chosen:
            for policy in ("past-future", "conservative", "lightllm"):
                yield policy, self.paused(policy=policy)
            for order in ("sjf", "hrrn"):
                yield f"paused by {order}", self.paused("--pause_order", order)
        if "killed" in chosen:
            yield "worker killed", self.killed()
        if "tp" in chosen:
            yield f"tp {tp}", self.parallel(tp)


def joined(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """`result`, with the modes that `path` has besides, where that is of the same prompts and the same software."""
    earlier: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"modes": {}}
    about = result.keys() - {"modes", "seconds", "date"}
    if any(earlier.get(name) != result[name] for name in about):
        return result
    return result | {"modes": earlier["modes"] | result["modes"]}


def main() -> int:
    parser = argparse.ArgumentParser(description="greedy tokens and logprobs against transformers, fp32")
    parser.add_argument("--model_dir", help="Hugging Face folder, hub id or .gguf file; the demo model without it")
    parser.add_argument("--prompts", type=int, default=40, help="how many (40)")
    parser.add_argument("--longest", type=int, default=1500, help="tokens of the longest prompt (1500)")
    parser.add_argument("--steps", type=int, default=48, help="tokens generated for each prompt, at most (48)")
    parser.add_argument("--tp", type=int, default=3, help="ranks of the tensor-parallel mode (3)")
    parser.add_argument("--device", default="cpu", help="of the server: cpu or cuda (cpu)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="all without it")
    parser.add_argument("--save", type=Path, help="write the result as JSON; other modes that it has are kept")
    args = parser.parse_args()
    began = time.monotonic()
    files = resolve(args.model_dir, progress=lambda phase, fraction: None)
    parity = Parity(files.folder, args.prompts, args.longest, args.steps, args.device)
    print(f"{len(parity.prompts)} prompts of 1 to {max(map(len, parity.prompts))} tokens, references after "
          f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    date, modes = time.strftime("%Y-%m-%d"), {}
    for mode, verdict in parity.modes(args.tp, args.modes):
        modes[mode] = verdict
        state = "equal" if not verdict.ties and not verdict.wrong else "; ".join(verdict.wrong + verdict.ties)
        print(
            f"{mode:20} {verdict.compared:6} tokens, logprobs within {verdict.logprob_error:.1e}: {state}", flush=True
        )
    result = {
        "what": "greedy tokens and logprobs against transformers, fp32",
        "model": files.name,
        "prompts": [len(prompt) for prompt in parity.prompts],
        "steps": args.steps,
        "modes": {mode: verdict._asdict() | {"date": date} for mode, verdict in modes.items()},
        "seconds": round(time.monotonic() - began),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date,
    }
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(json.dumps(joined(result, args.save), indent=1) + "\n")
    return 1 if any(verdict.wrong for verdict in modes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
