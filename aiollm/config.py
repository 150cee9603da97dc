"""Every setting once: flags, environment variables, ranges, help and error messages all follow from `Config`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec
from msgspec import Meta

GROUPS = MODEL, NETWORK, DEVICE, SCHEDULING, OPERATION = "Model", "Network", "Device", "Scheduling", "Operation"

MASK = "***"  # in place of a secret; no setting takes it, so that printed settings do not become those of a server
ROWS = {"cuda": 1024, "cpu": 64}
STEP_SECONDS = {"cuda": 300.0, "cpu": 3600.0}  # two cores compute 2,048 tokens of an 8B model in ten minutes
CHUNK = 2048  # tokens
MOST_ROWS = 65_536  # each takes 8 bytes for each position of a request, and every size of a step is made ready

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
            spellings={"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"},
        ),
    ] = "auto"
    load_format: Annotated[
        Literal["auto", "dummy"],
        Setting(
            MODEL,
            "FORMAT",
            "dummy fills the weights with random numbers, to measure without a checkpoint",
            # What auto reads; pickled files are converted first.
            spellings=dict.fromkeys(("hf", "safetensors", "fastsafetensors", "runai_streamer", "gguf"), "auto"),
        ),
    ] = "auto"
    chat_template: Annotated[
        str, Setting(MODEL, "FILE", "Jinja text that chats are written with; none takes the model's own")
    ] = ""
    split_special_tokens: Annotated[
        bool,
        Setting(
            MODEL,
            "",
            "cut special tokens in prompts, documents and messages of users and tools as the text that they look like",
        ),
    ] = False
    generation_config: Annotated[
        Literal["auto", "none"],
        Setting(
            MODEL,
            "SOURCE",
            "sampling of requests that do not say it: auto takes the model's generation_config.json, none "
            "temperature 1 over all tokens",
            spellings={"vllm": "none"},
        ),
    ] = "auto"
    tool_call_parser: Annotated[
        Literal["auto", "none", "hermes", "llama3", "mistral", "deepseek", "glm", "qwen3_coder", "pythonic"],
        Setting(
            MODEL,
            "FORMAT",
            "how the model writes calls of functions; auto goes by its chat template",
            spellings={
                "qwen": "hermes",
                "qwen25": "hermes",
                "llama3_json": "llama3",
                "deepseekv3": "deepseek",
                "deepseekv31": "deepseek",
                "deepseek_v3": "deepseek",
                "deepseek_v31": "deepseek",
                "glm45": "glm",
                "glm47": "glm",
                "qwen3_xml": "qwen3_coder",
                "llama4_pythonic": "pythonic",
            },
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        Literal["auto", "none", "think", "deepseek_r1", "mistral"],
        Setting(
            MODEL,
            "FORMAT",
            "how the model writes what it thinks before it answers; auto goes by its chat template, deepseek_r1 takes "
            "all up to </think> for it",
            spellings={
                "qwen3": "think",
                "glm45": "think",
                "deepseek_v3": "think",
                "deepseek-v3": "think",
                "deepseek-r1": "deepseek_r1",
                "qwen3-thinking": "deepseek_r1",
            },
        ),
    ] = "auto"
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
    api_key_file: Annotated[
        str,
        Setting(
            NETWORK,
            "FILE",
            "YAML file of more keys: names, digests and limits; `aiollm key NAME` draws one, SIGHUP reads it again",
        ),
    ] = ""
    ssl_certfile: Annotated[
        str,
        Setting(
            NETWORK,
            "FILE",
            "PEM certificate, those of its issuers behind it: serve HTTPS instead of HTTP; SIGHUP reads it again",
        ),
    ] = ""
    ssl_keyfile: Annotated[
        str, Setting(NETWORK, "FILE", "PEM key of --ssl_certfile, without a password; none looks for it in there")
    ] = ""
    ssl_ca_certs: Annotated[
        str,
        Setting(NETWORK, "FILE", "PEM certificates of issuers: only clients with a certificate of theirs are let in"),
    ] = ""
    admin_socket: Annotated[
        str, Setting(NETWORK, "PATH", "Unix socket for the operator: state, flush, drain, log level, trace, profile")
    ] = ""
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
            spellings={"auto": "0"},
        ),
    ] = 0
    long_truncation_mode: Annotated[
        Literal["none", "head", "center"],
        Setting(SCHEDULING, "MODE", "a prompt that is too long is refused, or loses its head or its center"),
    ] = "none"
    running_max_req_size: Annotated[
        int,
        Meta(ge=0, le=MOST_ROWS),
        Setting(
            SCHEDULING,
            "REQUESTS",
            f"requests that run at once; 0 is {ROWS['cuda']:,} on a GPU and {ROWS['cpu']} on a CPU",
            aliases=["max-num-seqs"],
        ),
    ] = 0
    max_n: Annotated[
        int,
        Meta(ge=1, le=1024),
        Setting(SCHEDULING, "CHOICES", "the most choices of one prompt: n and best_of"),
    ] = 128
    max_queue: Annotated[
        int, Meta(ge=0), Setting(SCHEDULING, "REQUESTS", "requests that may wait; one more is refused")
    ] = 1024
    batch_max_tokens: Annotated[
        int,
        Meta(ge=0),
        Setting(
            SCHEDULING,
            "TOKENS",
            "the most prompt tokens of one iteration (beside few streams about 768, and two for each stream); more"
            " finishes prompts sooner, fewer keeps running streams smooth;"
            f" 0 is chunked_prefill_size, or {CHUNK:,}",
            aliases=["max-num-batched-tokens"],
        ),
    ] = 0
    chunked_prefill_size: Annotated[
        int,
        Meta(ge=0),
        Setting(SCHEDULING, "TOKENS", "the most tokens of one prompt in one iteration; 0 is batch_max_tokens"),
    ] = 0
    max_queue_tokens: Annotated[
        int, Meta(ge=0), Setting(SCHEDULING, "TOKENS", "tokens of requests that may wait; 0 is four times the KV cache")
    ] = 0
    max_queue_share: Annotated[
        float,
        Meta(gt=0, le=1),
        Setting(
            SCHEDULING, "SHARE", "share of max_queue that requests of one API key may take, where there are several"
        ),
    ] = 0.5
    cache_share: Annotated[
        float,
        Meta(gt=0, le=1),
        Setting(
            SCHEDULING,
            "SHARE",
            "share of the prefix cache that one API key may keep while others want room; api_key_file may say another",
        ),
    ] = 0.8
    queue_timeout: Annotated[
        float,
        Meta(ge=0),
        Setting(
            SCHEDULING, "SECONDS", "how long a request may wait for its begin before it is given up; 0 is for ever"
        ),
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
        Setting(
            SCHEDULING,
            "SHARE",
            "policy lightllm: share of the KV cache in use from which on the longest outputs are expected",
        ),
    ] = 0.0
    router_max_new_token_len: Annotated[
        int,
        Meta(ge=1),
        Setting(SCHEDULING, "TOKENS", "policy lightllm: length that outputs are expected to have below that share"),
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
        float,
        Meta(gt=0),
        Setting(SCHEDULING, "SECONDS", "time to the first token that the orders deadline and sla aim at"),
    ] = 10.0
    gap_target: Annotated[
        float,
        Meta(ge=0),
        Setting(
            SCHEDULING,
            "SECONDS",
            "time between two tokens of a stream, for which prompts are computed in smaller chunks; 0 keeps the chunks",
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
    step_timeout: Annotated[
        float,
        Meta(ge=0, le=86400),
        Setting(
            OPERATION,
            "SECONDS",
            "a worker that has work and gives no sign of life for so long is killed and started again; 0 is "
            f"{STEP_SECONDS['cuda']:g} on a GPU and {STEP_SECONDS['cpu']:,.0f} on a CPU",
        ),
    ] = 0.0
    record: Annotated[
        str,
        Setting(
            OPERATION,
            "FILE",
            "keep the messages to the worker; `python -m aiollm.workers --replay FILE` runs them without a server",
        ),
    ] = ""
    trace: Annotated[
        str,
        Setting(OPERATION, "FILE", "write what the device did as a trace for ui.perfetto.dev; aiollm trace sums it up"),
    ] = ""
    access_log: Annotated[
        Literal["json", "off"],
        Setting(OPERATION, "FORMAT", "json logs a line for each request at its end, but for probes"),
    ] = "json"
    log_prompts: Annotated[
        bool,
        Setting(
            OPERATION, "", "add the first 512 tokens of the prompt to that line; they are logged nowhere otherwise"
        ),
    ] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Setting(OPERATION, "LEVEL", "the least grave of what is logged")
    ] = "info"


LIVE = frozenset({"api_key", "api_key_file", "max_queue_share", "cache_share", "log_level"})
"""Settings that SIGHUP changes; the others take a new start."""


def resolved(config: Config, device: str) -> Config:
    """The settings with those filled in that were left open and depend on others; `device` is cpu or cuda."""
    budget = config.batch_max_tokens or config.chunked_prefill_size or CHUNK
    return msgspec.structs.replace(
        config,
        device=device,
        running_max_req_size=config.running_max_req_size or ROWS[device],
        step_timeout=config.step_timeout or STEP_SECONDS[device],
        batch_max_tokens=budget,
        chunked_prefill_size=min(config.chunked_prefill_size or budget, budget),
    )


def device(name: str) -> str:
    """`auto` is a GPU where the NVIDIA driver is loaded."""
    if name != "auto":
        return name
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def shown(config: Config) -> dict[str, Any]:
    """The settings that clients may read: how the model is computed and scheduled, no paths, addresses or keys."""
    groups = {DEVICE, SCHEDULING}
    names = [name for name, field in FIELDS.items() if field.setting.group in groups and not field.setting.secret]
    return {name: getattr(config, name) for name in ("data_type", "load_format", *names)}


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
