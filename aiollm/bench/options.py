"""The options of `aiollm bench serve`, with vLLM's names, and the load that they ask for."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiollm.bench import peer_options
from aiollm.bench.report import METRICS
from aiollm.bench.values import (
    id_range,
    integer,
    json_fields,
    limit_of_metric,
    metrics,
    number,
    own_or_integer,
    pair,
    percentiles,
    range_ratio,
)
from aiollm.bench.workloads import (
    RAMPS,
    SHAREGPT,
    WORKLOADS,
    Draw,
    Job,
    LoadError,
    Ramp,
    Turn,
    Workload,
    around,
    fixed,
    jobs,
    read_texts,
    shuffled,
    text_jobs,
    with_output,
)

DATASETS = ("random", "sharegpt", "lengths", "prefix_repetition", "multi_turn", "custom")
BACKENDS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
SEED = 20261121  # that of tools/baselines.json
MAX_RPS = 1_000_000
REAL_SHARED = 0.5  # of each prompt, from one of a few texts


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; dashes and underscores in their names are the same."""
    wanted = parser()
    args = wanted.parse_args([_with_dashes(word) for word in argv])
    peer_options.answer(wanted, args)
    general = {"input_len": ("random",), "output_len": ("random", "sharegpt", "custom", "prefix_repetition")}
    for name, datasets in general.items():
        if (length := getattr(args, name)) is not None:
            vars(args).update({f"{dataset}_{name}": length for dataset in datasets})
    return args


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="aiollm bench serve",
        description="Puts load on an OpenAI-compatible server and prints what it took.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        allow_abbrev=False,
    )

    def add(group: Any, name: str, **options: Any) -> None:
        group.add_argument(f"--{name}", **options)

    server: Any = result.add_argument_group("Server")
    server.add_argument("--backend", "--endpoint-type", choices=BACKENDS, default="openai",
        help="openai (= vllm): completions; openai-chat: chats")  # fmt: skip
    add(server, "base-url", metavar="URL", help="where the server is, without a path (http://HOST:PORT)")
    add(server, "host", default="127.0.0.1", help="(127.0.0.1)")
    add(server, "port", type=integer(1, 65535), default=8000, metavar="NUMBER", help="(8000)")
    add(server, "endpoint", metavar="PATH", help="path of the requests (that of the backend)")
    add(server, "header", metavar="KEY=VALUE", nargs="*", action="extend", default=[], type=pair, help="sent along")
    add(server, "model", metavar="NAME", help="the model's name (the first of /v1/models)")
    add(server, "served-model-name", metavar="NAME", help="what requests call it, where that is another name (--model)")
    add(server, "ready-check-timeout-sec", type=number(0), default=600.0, metavar="SECONDS",
        help="how long to wait for a server that loads (600)")  # fmt: skip
    add(server, "timeout", type=number(0.001), default=600.0, metavar="SECONDS", help="for one request (600)")

    load: Any = result.add_argument_group("Load")
    add(load, "workload", choices=WORKLOADS, metavar="NAME",
        help=f"a named load, which the options below change: {', '.join(WORKLOADS)}")  # fmt: skip
    add(load, "num-prompts", type=integer(1), metavar="REQUESTS", help="in all (1000)")
    add(load, "max-concurrency", type=integer(1), nargs="+", default=[], metavar="REQUESTS",
        help="at once, at most; several values are run in turn")  # fmt: skip
    add(load, "request-rate", type=number(0.001), nargs="+", default=[], metavar="RPS",
        help="requests per second; inf sends all at once (inf); several values are run in turn")  # fmt: skip
    add(load, "burstiness", type=number(0.001), default=1.0, metavar="SHAPE",
        help="of the gamma distribution of times between requests: 1 Poisson, less bursts, inf even (1)")  # fmt: skip
    add(load, "ramp-up-strategy", choices=RAMPS, metavar="HOW",
        help=f"{' or '.join(RAMPS)}: the rate rises from the first request to the last, in place of --request-rate"
    )  # fmt: skip
    add(load, "ramp-up-start-rps", type=number(0.001, MAX_RPS), metavar="RPS", help="requests per second at the first")
    add(load, "ramp-up-end-rps", type=number(0.001, MAX_RPS), metavar="RPS", help="requests per second at the last")
    add(load, "num-warmups", type=integer(0), default=0, metavar="REQUESTS", help="before those that count (0)")
    add(load, "seed", type=integer(0), default=SEED, metavar="NUMBER",
        help=f"of lengths, prompts and arrivals ({SEED})")  # fmt: skip
    add(load, "procs", type=integer(1), default=4, metavar="PROCESSES", help="of the client (4)")

    prompts: Any = result.add_argument_group("Prompts")
    add(prompts, "dataset-name", type=_dataset, default="random", metavar="NAME",
        help="random (the default); sharegpt: lengths of 2,000 real conversations, or those of --dataset-path; "
        "lengths: those of --dataset-path; prefix_repetition: some beginnings, each shared by many; multi_turn: "
        "conversations, where each prompt holds all that was said; custom: texts of --dataset-path")  # fmt: skip
    add(prompts, "dataset-path", type=Path, metavar="FILE",
        help="lengths: JSON list of [prompt, output] tokens; sharegpt: that, or ShareGPT's JSON of conversations, "
        'whose texts are asked; custom: JSON lines {"prompt": text, "output_tokens": n}'
    )  # fmt: skip
    add(prompts, "disable-shuffle", action="store_true",
        help="take conversations and texts in the order of their file, and not as --seed draws them")  # fmt: skip
    add(prompts, "input-len", type=integer(1), metavar="TOKENS", help="as --random-input-len")
    add(prompts, "output-len", type=integer(1), metavar="TOKENS", help="of each answer, whatever the dataset")
    for kind, length, generated in (("random", 1024, 128), ("prefix-repetition", 256, 128)):
        own = "suffix-len" if kind == "prefix-repetition" else "input-len"
        add(prompts, f"{kind}-{own}", type=integer(1), metavar="TOKENS", help=f"of each prompt ({length})")
        add(prompts, f"{kind}-output-len", type=integer(1), metavar="TOKENS", help=f"of each answer ({generated})")
    add(prompts, "sharegpt-output-len", type=integer(1), metavar="TOKENS", help="of each answer (the conversation's)")
    add(prompts, "custom-output-len", type=own_or_integer, default=256, metavar="TOKENS",
        help="of each answer; -1: output_tokens of the file (256)")  # fmt: skip
    add(prompts, "random-range-ratio", type=range_ratio, default=(0.0, 0.0), metavar="SHARE",
        help='lengths are uniform within this share of both, 0 to 1 (0), or {"input": SHARE, "output": SHARE}'
    )  # fmt: skip
    add(prompts, "random-prefix-len", type=integer(0), default=0, metavar="TOKENS",
        help="that all prompts begin with, besides (0)")  # fmt: skip
    add(prompts, "prefix-repetition-prefix-len", type=integer(1), default=256, metavar="TOKENS",
        help="of each beginning (256)")  # fmt: skip
    add(prompts, "prefix-repetition-num-prefixes", type=integer(1), default=10, metavar="BEGINNINGS", help="(10)")
    add(prompts, "multi-turn-num-turns", type=integer(1), default=4, metavar="REQUESTS",
        help="of a conversation; --random-input-len is what each brings, --random-prefix-len what all "
        "conversations begin with (4)")  # fmt: skip
    add(prompts, "token-ids", type=id_range, default=(300, 40000), metavar="LOW:HIGH",
        help="prompts are drawn from these ids, HIGH excluded (300:40000)")  # fmt: skip

    sampling: Any = result.add_argument_group("Sampling")
    add(sampling, "temperature", type=number(0), metavar="NUMBER", help="0 is greedy (1)")
    add(sampling, "top-p", type=number(0, 1), metavar="PROBABILITY", help="(the server's)")
    add(sampling, "top-k", type=integer(-1), metavar="TOKENS", help="(the server's)")
    add(sampling, "min-p", type=number(0, 1), metavar="SHARE", help="(the server's)")
    for kind in ("presence", "frequency"):
        add(sampling, f"{kind}-penalty", type=number(-2, 2), metavar="NUMBER", help="-2 to 2 (the server's)")
    add(sampling, "repetition-penalty", type=number(0.001), metavar="FACTOR", help="(the server's)")
    add(sampling, "logprobs", type=integer(0), metavar="TOKENS", help="tell those of so many at each place (none)")
    add(sampling, "ignore-eos", action=argparse.BooleanOptionalAction, help="go on behind EOS (on)")
    add(sampling, "extra-body", type=json_fields, default={}, metavar="JSON", help="more fields of every request")
    add(sampling, "real-life", action="store_true",
        help="what users' requests carry: EOS obeyed, stop strings, a seed each, penalties, top_p, logprobs, and half "
        "of each prompt shared with others; the options above win")  # fmt: skip

    output: Any = result.add_argument_group("Result")
    add(output, "percentile-metrics", default="ttft,tpot,itl,e2el,gap", type=metrics, metavar="NAMES",
        help=f"tables that are printed: {', '.join(METRICS)} (all)")  # fmt: skip
    add(output, "metric-percentiles", default="99", type=percentiles, metavar="NUMBERS", help="like 50,90,99 (99)")
    add(output, "goodput", nargs="+", type=limit_of_metric, default=[], metavar="METRIC:MS",
        help="count requests per second that keep these, like ttft:200 tpot:50")  # fmt: skip
    add(output, "save-result", action="store_true", help="write the figures as JSON")
    add(output, "save-detailed", action="store_true", help="and every request's")
    add(output, "append-result", action="store_true", help="as a line behind those of the file, if there are any")
    add(output, "metadata", nargs="*", type=pair, default=[], metavar="KEY=VALUE", help="kept in that file")
    add(output, "result-dir", type=Path, default=Path("."), metavar="FOLDER", help="(.)")
    add(output, "result-filename", metavar="FILE", help="(made of the load, the model and the time)")
    add(output, "label", metavar="TEXT", help="kept in the file (the backend)")
    add(output, "plot", type=Path, metavar="PNG", help="draw TTFT, TPOT and throughput over the runs' load")
    add(output, "disable-tqdm", action="store_true", help="no line on the terminal that counts requests")
    peer_options.add(result)
    return result


def points(args: argparse.Namespace) -> int:
    counts = {len(values) for values in (args.max_concurrency, args.request_rate) if len(values) > 1}
    if len(counts) > 1:
        raise LoadError("--max-concurrency and --request-rate have several values each, and not as many")
    return counts.pop() if counts else 1


def workload(args: argparse.Namespace, point: int) -> Workload:
    """The load of one point: a named one, or the options', with what was asked for beside."""
    if args.workload is not None:
        lengths = args.random_input_len, args.random_output_len, args.sharegpt_output_len
        if args.dataset_name != "random" or args.dataset_path or any(lengths):
            raise LoadError("--workload says what prompts are like; leave --dataset-... and --...-len out")
        base = WORKLOADS[args.workload]
    else:
        base = Workload(1000, None, None, _lengths(args))
    found = base
    if args.num_prompts is not None:
        found = found._replace(requests=args.num_prompts)
    if args.max_concurrency:
        found = found._replace(concurrency=_nth(args.max_concurrency, point))
    if args.request_rate:
        rate = _nth(args.request_rate, point)
        found = found._replace(rate=None if math.isinf(rate) else rate)
    ramp = _ramp(args)
    return found._replace(rate=None, ramp=ramp) if ramp else found


def _ramp(args: argparse.Namespace) -> Ramp | None:
    ends = args.ramp_up_start_rps, args.ramp_up_end_rps
    if args.ramp_up_strategy is None:
        if ends != (None, None):
            raise LoadError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
        return None
    if None in ends:
        raise LoadError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
    if args.request_rate:
        raise LoadError("--ramp-up-strategy says how many requests come each second; leave --request-rate out")
    if ends[0] > ends[1]:
        raise LoadError("--ramp-up-start-rps must not be more than --ramp-up-end-rps")
    return Ramp(args.ramp_up_strategy, *ends)


def _nth(values: Sequence[Any], point: int) -> Any:
    return values[point] if len(values) > 1 else values[0]


def _lengths(args: argparse.Namespace) -> Any:
    if args.dataset_name in ("lengths", "custom") and args.dataset_path is None:
        raise LoadError(f"--dataset-name {args.dataset_name} needs --dataset-path")
    if args.dataset_name == "sharegpt":
        return args.dataset_path or SHAREGPT
    if args.dataset_name == "lengths":
        return args.dataset_path
    if args.dataset_name == "prefix_repetition":
        return fixed(args.prefix_repetition_suffix_len or 256, args.prefix_repetition_output_len or 128)
    prompt, output = args.random_input_len or 1024, args.random_output_len or 128
    return around(prompt, output, *args.random_range_ratio) if any(args.random_range_ratio) else fixed(prompt, output)


def drawn(args: argparse.Namespace, load: Workload, point: int, conversations: Sequence[Turn] = ()) -> list[Job]:
    """The requests of one point: with the texts of `conversations`, if there are any."""
    low, high = args.token_ids
    draw = Draw(
        args.seed, low, high, args.burstiness, args.random_prefix_len,
        shared=REAL_SHARED if args.real_life else 0.0, point=point,
    )  # fmt: skip
    if args.dataset_name == "custom":
        conversations = read_texts(args.dataset_path, args.custom_output_len)
        conversations = conversations if args.disable_shuffle else shuffled(conversations, args.seed)
    if conversations:
        return text_jobs(conversations, load, draw)
    if args.backend == "openai-chat":
        raise LoadError("--backend openai-chat needs texts: --dataset-name custom, or sharegpt with a file of them")
    if args.dataset_name == "prefix_repetition":
        prefix, count = args.prefix_repetition_prefix_len, args.prefix_repetition_num_prefixes
        draw = draw._replace(prefix=prefix, prefixes=count)
    elif args.dataset_name == "multi_turn":
        draw = draw._replace(turns=args.multi_turn_num_turns)
    found = jobs(load, draw)
    given = {"sharegpt": args.sharegpt_output_len, "lengths": args.output_len}
    return with_output(found, given.get(args.dataset_name))


def _dataset(text: str) -> str:
    if text in DATASETS:
        return text
    reason = peer_options.DATASETS.get(text, "it is not known")
    raise argparse.ArgumentTypeError(f"{text} is not here: {reason}; there are {', '.join(DATASETS)}")


def _with_dashes(word: str) -> str:
    """--num_prompts=4 -> --num-prompts=4; a word that is no option stays as it is."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word
