"""Options of vLLM's and SGLang's benchmarks that are none of `aiollm bench serve`: those that change nothing are taken,
and answered with the reason; the others end the start with it.

Each is written with the placeholder of its argument; without one it takes none.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple


class PeerOption(NamedTuple):
    unit: str
    reason: str


_NO_EFFECT = {
    "prompts are token ids, and texts are read by the server's tokenizer": (
        "tokenizer NAME, tokenizer-mode MODE, skip-tokenizer-init"
    ),
    "no code of a model is loaded": "trust-remote-code",
    "the server gives requests their ids": "request-id-prefix TEXT",
    "completions send texts as they are, and chats as messages": "skip-chat-template",
}
_NOT_HERE = {
    "a profile is taken on the server's --admin_socket while the load runs: POST /profile": "profile",
    "--save-detailed keeps the times of every request, and --plot draws figures over several loads": (
        "plot-timeline, timeline-itl-thresholds MS, plot-dataset-stats"
    ),
    "what is measured is when tokens come, in a stream": "no-stream",
    "there is no beam search": "use-beam-search",
    "there are no adapters": "lora-modules NAME, lora-assignment NAME",
    "certificates are checked": "insecure",
    "the server renders chats: --extra-body '{\"chat_template_kwargs\": {...}}' says with what": (
        "chat-template-kwargs JSON"
    ),
    "every request counts; a second aiollm bench serve sends others beside them": "probe-request-rate RPS",
    "prompts are text": (
        "enable-multimodal-chat, custom-ensure-client-side-data, random-mm-base-items-per-request ITEMS,"
        " random-mm-num-mm-items-range-ratio SHARE, random-mm-limit-mm-per-prompt JSON, random-mm-bucket-config TEXT,"
        " asr-min-audio-len-sec SECONDS, asr-max-audio-len-sec SECONDS"
    ),
    "what is measured are completions and chats": "no-reranker",
    "where a file is short it is taken from the first again; --num-prompts asks for fewer": "no-oversample",
    "a request has one prompt": "random-batch-size PROMPTS",
    "its dataset is not here; --dataset-name names those that are": (
        "sonnet-input-len TOKENS, sonnet-output-len TOKENS, sonnet-prefix-len TOKENS, hf-subset NAME, hf-split NAME,"
        " hf-name NAME, hf-output-len TOKENS, spec-bench-output-len TOKENS, spec-bench-category NAME,"
        " blazedit-min-distance SHARE, blazedit-max-distance SHARE, bfcl-categories NAMES,"
        " speed-bench-dataset-subset NAME, speed-bench-output-len TOKENS, speed-bench-category NAME, self-timed,"
        " no-self-timed, timed-trace-chunk-hash-size TOKENS, timed-trace-sec-multiplier FACTOR,"
        " timed-trace-label-timestamp NAME, timed-trace-label-input-length NAME, timed-trace-label-output-length NAME,"
        " timed-trace-label-hash-ids NAME"
    ),
    "--backend openai-chat sends chats, which the server renders": "apply-chat-template",
    "each load has prompts of its own; the server's --admin_socket has POST /flush": "flush-cache",
    "one server computes prompts and outputs": "pd-separated",
}


def _options(table: dict[str, str]) -> Iterator[tuple[str, PeerOption]]:
    for reason, options in table.items():
        for option in options.split(","):
            name, _, unit = option.strip().partition(" ")
            yield name, PeerOption(unit, reason)


NO_EFFECT = dict(_options(_NO_EFFECT))
NOT_HERE = dict(_options(_NOT_HERE))

# Names of --dataset-name there.
DATASETS = {
    "sonnet": "it needs vLLM's file sonnet.txt; custom reads texts of your own",
    "hf": "it needs a download from the Hugging Face Hub; custom reads texts of your own",
    "burstgpt": "it needs a table of lengths that is downloaded; lengths reads [prompt, output] pairs",
    "spec_bench": "it needs a file that is downloaded; custom reads texts of your own",
    "speed_bench": "it needs a download from the Hugging Face Hub; custom reads texts of your own",
    "timed_trace": "--request-rate and --ramp-up-strategy say when requests come; lengths reads [prompt, output] pairs",
    "txt-slices": "custom reads texts of your own",
    "random-mm": "prompts are text",
    "custom_audio": "prompts are text",
    "custom_image": "prompts are text",
    "custom_mm": "prompts are text",
    "random-rerank": "what is measured are completions and chats",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Have them parsed, unseen in the help; only those that are given are in the result."""
    for name, option in (NO_EFFECT | NOT_HERE).items():
        takes: dict[str, Any] = {"metavar": option.unit, "nargs": "+"} if option.unit else {"action": "store_true"}
        parser.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **takes)


def answer(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Say why those that are given have no effect, or end with the reason why they cannot be had."""
    for name in vars(args):
        if name in NO_EFFECT:
            print(f"aiollm: --{name} has no effect: {NO_EFFECT[name].reason}", file=sys.stderr)
        elif name in NOT_HERE:
            parser.error(f"--{name} cannot be had: {NOT_HERE[name].reason}")
