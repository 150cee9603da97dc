"""Every setting once: flags, environment variables, ranges, help and error messages all follow from `Config`.

The setting `port` is given as `--port`, as AIOLLM_PORT in the environment, or as `port:` in the YAML file that
`--config` names; the first of these wins. Names may be written with underscores (LightLLM) or dashes (vLLM), and some
have an alias in one of the two.
"""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_args, get_origin

import msgspec
from msgspec import Meta

from aiollm import __version__

GROUPS = MODEL, NETWORK, DEVICE, SCHEDULING, OPERATION = "Model", "Network", "Device", "Scheduling", "Operation"

PREFIX = "AIOLLM_"
# Command -> its arguments in the usage, and what it does.
COMMANDS = {
    "serve": ("[MODEL] [flags]", "serve a model over HTTP; the default"),
    "doctor": ("[MODEL] [flags]", "check this machine for a server with these flags"),
    "models": ("", "list the models that can be served"),
    "convert": ("FOLDER [--output FOLDER]", "turn a pickled checkpoint into safetensors"),
    "tune": ("[--model FOLDER]", "find the kernels' fastest launch parameters on this GPU"),
    "bench": ("serve|static [flags]", "put load on a running server; static: one step of a model on this GPU"),
    "chat": ("[--url URL]", "talk to a running server"),
    "trace": ("FILE", "sum up what --trace FILE wrote: gaps between iterations"),
    "completion": ("bash|zsh|fish", "print a script by which the shell completes flags"),
}
MASK = "***"  # in place of a secret; no setting takes it, so that printed settings do not become those of a server
OTHER_VARIABLES = {
    "CACHE_DIR": "the folder where downloaded and converted models are kept (~/.cache/aiollm)",
    "TRITON_AUTOTUNE_LEVEL": "what a starting worker tunes: 0 nothing, 1 what is missing, 2 all; 3 ignores tuning",
}

# Flags of LightLLM and vLLM that ask for what is always so: accepted, and answered with the reason. The value is the
# placeholder of the flag's argument, "" where it takes none.
ROWS = {"cuda": 1024, "cpu": 64}
CHUNK = 2048  # tokens

NO_EFFECT = {
    "trust_remote_code": ("", "code from a checkpoint is never executed"),
    "tokenizer_mode": ("MODE", "one fast tokenizer reads every kind of vocabulary; there is no slow one"),
    "enable_chunked_prefill": ("", "prompts are always computed in chunks"),
    "disable_chunked_prefill": ("", "prompts are always computed in chunks; --batch_max_tokens makes them larger"),
    "block_size": ("TOKENS", "the KV cache is managed token by token"),
    "swap_space": ("GIB", "what is paused is computed again, or found in the prefix cache"),
    "graph_max_batch_size": ("ROWS", "there are graphs for every number of rows"),
    "graph_split_batch_size": ("ROWS", "there are graphs for every number of rows"),
    "graph_grow_step_size": ("ROWS", "there are graphs for every number of rows"),
    "graph_max_len_in_batch": ("TOKENS", "a graph serves every length"),
    "enable_prefix_caching": ("", "it is on unless --disable_dynamic_prompt_cache is given"),
}


ApiKey = Annotated[
    str,
    Meta(
        pattern=r"^(?!\*+$)[!-+\--~]{1,1000}\Z",
        description="of 1 to 1000 visible ASCII characters without a comma, not asterisks alone",
    ),
]
Origin = Annotated[
    str, Meta(pattern=r"^https?://[^/?#@\s,]+\Z", description="text like https://chat.example or http://10.0.0.1:8080")
]


class Setting(NamedTuple):
    """What `Config` says of a field, beside its type, range and default."""

    group: str
    """Its heading in --help."""
    unit: str
    """Placeholder of the flag's value."""
    text: str
    aliases: Sequence[str] = ()
    spellings: Mapping[str, str] = MappingProxyType({})
    """Other spellings of its values."""
    secret: bool = False
    """Its values are shown nowhere."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of one server. Sizes are tokens, times are seconds."""

    model_dir: Annotated[
        str,
        Setting(
            MODEL,
            "MODEL",
            "Hugging Face folder, .gguf file or Hugging Face id like org/name; without it a small demo model is served",
            aliases=["model"],
        ),
    ] = ""
    revision: Annotated[str, Setting(MODEL, "REVISION", "branch, tag or commit of a Hugging Face id")] = ""
    model_name: Annotated[
        tuple[str, ...],
        Setting(MODEL, "NAME", "names that requests may use; none takes the model's own", ["served-model-name"]),
    ] = ()
    data_type: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8"],
        Setting(
            MODEL,
            "TYPE",
            "numbers of weights and KV cache; auto takes the checkpoint's on a GPU, fp32 on a CPU, and int8 weights "
            "for the demo model on a CPU that is made for them",
            aliases=["dtype"],
            spellings={"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"},
        ),
    ] = "auto"
    load_format: Annotated[
        Literal["auto", "dummy"],
        Setting(MODEL, "FORMAT", "dummy fills the weights with random numbers, to measure without a checkpoint"),
    ] = "auto"
    chat_template: Annotated[
        str, Setting(MODEL, "FILE", "Jinja text that chats are written with; none takes the model's own")
    ] = ""
    eos_id: Annotated[
        tuple[Annotated[int, Meta(ge=0)], ...],
        Setting(MODEL, "ID", "token ids that end an output; none takes the model's own"),
    ] = ()

    host: Annotated[str, Setting(NETWORK, "ADDRESS", "where to listen; 0.0.0.0 is every interface")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535), Setting(NETWORK, "PORT", "TCP port; 0 takes a free one")] = 8000
    api_key: Annotated[
        tuple[ApiKey, ...],
        Setting(
            NETWORK,
            "KEY",
            "what requests must show, all but probes; without a key everybody is let in. `ps` shows flags: set keys in "
            "the environment or a file",
            secret=True,
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[Origin, ...],
        Setting(NETWORK, "ORIGIN", "where a reverse proxy shows the chat page to browsers"),
    ] = ()

    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Setting(DEVICE, "DEVICE", "what computes; auto takes a GPU where there is one"),
    ] = "auto"
    tp: Annotated[
        int, Meta(ge=1), Setting(DEVICE, "RANKS", "GPUs that share one model", aliases=["tensor-parallel-size"])
    ] = 1
    mem_fraction: Annotated[
        float,
        Meta(gt=0, le=1),
        Setting(
            DEVICE,
            "FRACTION",
            "share of the device's memory for weights, KV cache and work space, which is measured",
            aliases=["gpu-memory-utilization"],
        ),
    ] = 0.95
    max_total_token_num: Annotated[
        int, Meta(ge=0), Setting(DEVICE, "TOKENS", "size of the KV cache; 0 measures what fits into mem_fraction")
    ] = 0
    disable_cudagraph: Annotated[
        bool, Setting(DEVICE, "", "launch each kernel by itself on a GPU: slower, for debugging", ["enforce-eager"])
    ] = False
    threads: Annotated[int, Meta(ge=0), Setting(DEVICE, "THREADS", "CPU threads for computing; 0 takes all")] = 0

    max_req_total_len: Annotated[
        int,
        Meta(ge=0),
        Setting(
            SCHEDULING,
            "TOKENS",
            "longest request, prompt and output together; 0 takes the model's context, or the KV cache if smaller",
            aliases=["max-model-len"],
        ),
    ] = 0
    long_truncation_mode: Annotated[
        Literal["none", "head", "center"],
        Setting(SCHEDULING, "MODE", "a prompt that is too long is refused, or loses its head or its center"),
    ] = "none"
    running_max_req_size: Annotated[
        int,
        Meta(ge=0),
        Setting(
            SCHEDULING,
            "REQUESTS",
            f"requests that run at once; 0 is {ROWS['cuda']:,} on a GPU and {ROWS['cpu']} on a CPU",
            aliases=["max-num-seqs"],
        ),
    ] = 0
    max_queue: Annotated[
        int, Meta(ge=0), Setting(SCHEDULING, "REQUESTS", "requests that may wait; one more is refused")
    ] = 1024
    batch_max_tokens: Annotated[
        int,
        Meta(ge=0),
        Setting(
            SCHEDULING,
            "TOKENS",
            "prompt tokens computed in one iteration; more finishes prompts sooner, fewer keeps running streams smooth;"
            f" 0 is chunked_prefill_size, or {CHUNK:,}",
            aliases=["max-num-batched-tokens"],
        ),
    ] = 0
    chunked_prefill_size: Annotated[
        int,
        Meta(ge=0),
        Setting(SCHEDULING, "TOKENS", "of one prompt computed in one iteration; 0 is batch_max_tokens"),
    ] = 0
    max_queue_tokens: Annotated[
        int, Meta(ge=0), Setting(SCHEDULING, "TOKENS", "that may wait; 0 is four times the KV cache")
    ] = 0
    max_queue_share: Annotated[
        float,
        Meta(gt=0, le=1),
        Setting(SCHEDULING, "SHARE", "of max_queue that the requests of one API key may take, where there are several"),
    ] = 0.5
    queue_timeout: Annotated[
        float,
        Meta(ge=0),
        Setting(SCHEDULING, "SECONDS", "a request that has waited so long and did not begin is given up; 0 is never"),
    ] = 600.0
    schedule_policy: Annotated[
        Literal["past-future", "conservative", "aggressive", "lightllm"],
        Setting(
            SCHEDULING,
            "POLICY",
            "admit a request when it fits by what outputs were like so far (past-future), when its longest output fits "
            "(conservative), at once, to pause some later (aggressive), or as LightLLM 1.1 does",
        ),
    ] = "past-future"
    router_token_ratio: Annotated[
        float,
        Meta(ge=0, le=1),
        Setting(SCHEDULING, "SHARE", "lightllm: of the KV cache in use from which on the longest outputs are expected"),
    ] = 0.0
    router_max_new_token_len: Annotated[
        int, Meta(ge=1), Setting(SCHEDULING, "TOKENS", "lightllm: what an output is expected to have, below that share")
    ] = 1024
    schedule_order: Annotated[
        Literal["fcfs", "fair", "deadline", "sla"],
        Setting(
            SCHEDULING,
            "ORDER",
            "who begins first: who came first (fcfs), the API key that had least (fair), by the client's "
            "X-Request-Timeout (deadline), or who can still begin within ttft_target (sla)",
        ),
    ] = "fair"
    pause_order: Annotated[
        Literal["fcfs", "sjf", "hrrn"],
        Setting(
            SCHEDULING,
            "ORDER",
            "who makes room: who came last (fcfs), who has the longest way to go (sjf), or who has waited least for "
            "its size (hrrn)",
        ),
    ] = "fcfs"
    ttft_target: Annotated[
        float, Meta(gt=0), Setting(SCHEDULING, "SECONDS", "to the first token, that the orders deadline and sla aim at")
    ] = 10.0
    gap_target: Annotated[
        float,
        Meta(ge=0),
        Setting(
            SCHEDULING,
            "SECONDS",
            "between two tokens of a stream: prompts are computed in smaller chunks to keep it; 0 keeps the chunks",
        ),
    ] = 1.5
    disable_dynamic_prompt_cache: Annotated[
        bool, Setting(SCHEDULING, "", "compute every prompt from its first token", ["no-enable-prefix-caching"])
    ] = False

    drain_timeout: Annotated[
        float,
        Meta(ge=0, le=86400),
        Setting(OPERATION, "SECONDS", "how long running requests may go on after SIGTERM"),
    ] = 30.0
    max_restarts: Annotated[
        int, Meta(ge=0), Setting(OPERATION, "TIMES", "how often a worker that died is started again")
    ] = 3
    record: Annotated[
        str, Setting(OPERATION, "FILE", "keep the messages to the worker, to be replayed without a server")
    ] = ""
    trace: Annotated[
        str,
        Setting(OPERATION, "FILE", "write what the device did as a trace for ui.perfetto.dev; aiollm trace sums it up"),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Setting(OPERATION, "LEVEL", "the least grave of what is logged")
    ] = "info"


def resolved(config: Config, device: str) -> Config:
    """The settings with those filled in that were left open and depend on others; `device` is cpu or cuda."""
    budget = config.batch_max_tokens or config.chunked_prefill_size or CHUNK
    return msgspec.structs.replace(
        config,
        device=device,
        running_max_req_size=config.running_max_req_size or ROWS[device],
        batch_max_tokens=budget,
        chunked_prefill_size=min(config.chunked_prefill_size or budget, budget),
    )


class Field(NamedTuple):
    """A field of `Config`, taken apart."""

    name: str
    type: Any
    """With its ranges, as msgspec reads it."""
    plain: Any
    meta: Meta
    setting: Setting
    default: Any

    @property
    def several(self) -> bool:
        return get_origin(self.plain) is tuple

    def shown(self, value: Any) -> Any:
        """The value as it may be printed."""
        return MASK if self.setting.secret and value else value


def _field(field: msgspec.structs.FieldInfo) -> Field:
    plain, *notes = get_args(field.type)
    (setting,) = (note for note in notes if isinstance(note, Setting))
    meta = next((note for note in notes if isinstance(note, Meta)), Meta())
    return Field(field.name, field.type, plain, meta, setting, field.default)


FIELDS = {field.name: _field(field) for field in msgspec.structs.fields(Config)}


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """The settings of `aiollm [serve|doctor [MODEL]] [flags]`; `argv` is without the program's name.

    --help, --version and --print_config print and exit with 0. What cannot be understood is named on stderr, and the
    exit code is 2.
    """
    named = argv[:1] in (["serve"], ["doctor"])
    parser = _Parser()
    found, rest = parser.parse_known_args([_with_underscores(word) for word in argv[named:]])
    flags: dict[str, Any] = vars(found)
    path, prints = flags.pop("config", None), flags.pop("print_config", False)
    for name in sorted(NO_EFFECT.keys() & flags.keys()):
        print(f"aiollm: --{name} has no effect: {NO_EFFECT[name][1]}", file=sys.stderr)
        del flags[name]
    for word in argv:
        if word.startswith("-") and _with_underscores(word) in rest:
            parser.error(f"unknown flag {word.partition('=')[0]}{_nearest(word, parser.flags)}")
    if rest and not named:
        hint = _nearest(rest[0], list(COMMANDS)) or f"; `aiollm serve {rest[0]}` serves a model"
        parser.error(f"unexpected argument {rest[0]}{hint}")
    if rest:
        models = [*rest, flags["model_dir"]] if "model_dir" in flags else rest
        if len(models) > 1:
            parser.error(f"more than one model: {', '.join(models)}")
        flags["model_dir"] = rest[0]

    values = _file(parser, path) if path is not None else {}
    for name, text in _variables(environ).items():
        if name not in flags:
            raw = _listed(",".join(text.split())) if FIELDS[name].several else text
            values[name] = _value(parser, FIELDS[name], PREFIX + name.upper(), raw)
    for name, given in flags.items():
        raw = _listed(",".join(given)) if FIELDS[name].several else given
        flag = " or ".join(f"--{spelling}" for spelling in (name, *FIELDS[name].setting.aliases))
        values[name] = _value(parser, FIELDS[name], flag, raw)
    config = Config(**values)
    if prints:
        from aiollm import yaml_file

        shown = {name: FIELDS[name].shown(value) for name, value in msgspec.to_builtins(config).items()}
        print(yaml_file.dump(shown), end="")
        parser.exit()
    return config


def allowed(plain: Any, meta: Meta) -> str:
    """The values of a type within a range, in words: "an integer from 0 to 65535"."""
    if get_origin(plain) is Annotated:
        return allowed(*get_args(plain))
    if get_origin(plain) is Literal:
        *some, last = get_args(plain)
        return f"{', '.join(some)} or {last}"
    if get_origin(plain) is tuple:
        return f"one or more, each {allowed(get_args(plain)[0], Meta())}"
    if meta.description is not None:
        return meta.description
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[plain]
    if meta.ge is not None and meta.le is not None:
        return f"{words} from {meta.ge} to {meta.le}"
    limits = {"above": meta.gt, "of at least": meta.ge, "at most": meta.le}
    stated = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
    return f"{words} {stated}".strip()


class _Parser(argparse.ArgumentParser):
    """The flags of `FIELDS`; their values stay text. Errors are one line, not the usage of thirty flags."""

    def __init__(self) -> None:
        variables = "; ".join(f"{PREFIX}{name}: {text}" for name, text in OTHER_VARIABLES.items())
        usages = [f"aiollm {name} {arguments}" for name, (arguments, _) in COMMANDS.items()]
        width = max(map(len, usages))
        texts = [text for _, text in COMMANDS.values()]
        lines = [f"{usage:<{width}}  {text}" for usage, text in zip(usages, texts, strict=True)]
        super().__init__(
            prog="aiollm",
            usage="\n       ".join(lines),
            description="Serves a language model over HTTP.",
            epilog=f"Each flag can also be set in the environment, as {PREFIX}PORT=9000, or in the file that --config "
            f"names; a flag wins over the environment, and that over the file. {variables}. "
            "Dashes and underscores in flags are the same.",
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110),
        )
        self.add_argument("--version", action="version", version=f"aiollm {__version__}")
        self.add_argument("--config", metavar="FILE", help="YAML file of settings, like port: 9000")
        self.add_argument("--print_config", action="store_true", help="print the settings as such a file, and exit")
        self.flags = ["--help", "--version", "--config", "--print_config"]
        groups = {title: self.add_argument_group(title) for title in GROUPS}
        for field in FIELDS.values():
            options: dict[str, Any] = {"dest": field.name, "metavar": field.setting.unit}
            if field.plain is bool:
                options = {"dest": field.name, "action": "store_const", "const": "true"}
            elif field.several:
                options |= {"action": "extend", "nargs": "+"}
            groups[field.setting.group].add_argument(f"--{field.name}", help=_help(field), **options)
            for alias in field.setting.aliases:
                self.add_argument(_with_underscores(f"--{alias}"), help=argparse.SUPPRESS, **options)
            self.flags += [f"--{spelling}" for spelling in (field.name, *field.setting.aliases)]
        for name, (unit, _) in NO_EFFECT.items():
            takes: dict[str, Any] = {"metavar": unit} if unit else {"action": "store_true"}
            self.add_argument(f"--{name}", help=argparse.SUPPRESS, **takes)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"aiollm: {message}\n`aiollm --help` lists the flags\n")


def _help(field: Field) -> str:
    """Text, range, default and aliases."""
    notes = []
    if field.plain not in (str, bool, tuple[str, ...]):
        notes.append(allowed(field.plain, field.meta))
    if field.default not in ("", ()) and field.plain is not bool:
        notes.append(f"default {field.default}")
    notes += [f"also --{alias}" for alias in field.setting.aliases]
    text = f"{field.setting.text} [{'; '.join(notes)}]" if notes else field.setting.text
    return text.replace("%", "%%")


def _value(parser: _Parser, field: Field, source: str, raw: Any) -> Any:
    """`raw` as the field's type; the parser's error names `source`, the value and the range."""
    given = field.shown(" ".join(map(str, raw)) if isinstance(raw, list) else raw)
    try:
        spelt = field.setting.spellings.get(raw, raw) if isinstance(raw, str) else raw
        return msgspec.convert(spelt, field.type, strict=False)
    except msgspec.ValidationError:
        parser.error(f"{source}: {given} must be {allowed(field.plain, field.meta)}")


def _file(parser: _Parser, path: str) -> dict[str, Any]:
    """The settings in a YAML file; null leaves one open."""
    from aiollm import yaml_file  # 20 ms, of use only here

    try:
        found = yaml_file.load(path)
    except (OSError, ValueError) as error:
        parser.error(f"--config {path}: {error}")
    names = {spelling: field.name for field in FIELDS.values() for spelling in (field.name, *field.setting.aliases)}
    plain = {spelling.replace("-", "_"): name for spelling, name in names.items()}
    values: dict[str, Any] = {}
    for key, raw in found.items():
        spelling = key.replace("-", "_")
        if spelling in NO_EFFECT:
            print(f"aiollm: {path}: {key} has no effect: {NO_EFFECT[spelling][1]}", file=sys.stderr)
            continue
        if spelling not in plain:
            parser.error(f"{path}: unknown setting {key}{_nearest(key, [*names, *plain])}")
        field = FIELDS[plain[spelling]]
        if field.name in values:
            parser.error(f"{path}: {field.name} stands there under two names, one of them {key}")
        if raw is not None:
            several = field.several and not isinstance(raw, list)
            values[field.name] = _value(parser, field, f"{path}: {key}", [raw] if several else raw)
    return values


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings in the environment. A name that means nothing is only warned of: Kubernetes makes its own
    (AIOLLM_SERVICE_HOST) where a service is called aiollm."""
    known = {PREFIX + name.upper(): name for name in FIELDS}
    others = [PREFIX + name for name in OTHER_VARIABLES]
    found = {}
    for variable in sorted(name for name in environ if name.startswith(PREFIX) and environ[name]):
        if variable in known:
            found[known[variable]] = environ[variable]
        elif variable not in others:
            hint = _nearest(variable, [*known, *others])
            print(f"aiollm: the variable {variable} is not known{hint}", file=sys.stderr)
    return found


def _listed(text: str) -> list[str]:
    """The values of a setting that takes several; each is one at least."""
    return [value for value in text.split(",") if value] or [""]


def _with_underscores(word: str) -> str:
    """--max-model-len=4 -> --max_model_len=4; a word that is no flag stays as it is."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else word


def _nearest(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.partition("=")[0], names, n=1)
    return f"; did you mean {near[0]}?" if near else ""
