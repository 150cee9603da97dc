"""Settings -> engine, model and workers, for a server and for a program that has none: the only file that knows all
parts."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from aiollm.api.parts import ModelInfo
from aiollm.api.parts import Settings as ApiSettings
from aiollm.config import Config, shown
from aiollm.engine.engine import Engine
from aiollm.engine.engine import Settings as EngineSettings
from aiollm.engine.policy import Aggressive, Conservative, LightLLM, PastFuture, Policy
from aiollm.engine.scheduler import Service
from aiollm.engine.share import WHOLE, Shares
from aiollm.fleet.fleet import Fleet
from aiollm.hub.resolve import ModelFiles, resolve
from aiollm.hub.served import check_served
from aiollm.text.chat import ChatTemplate
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.messages import Loading, Ready, WorkerSettings

T = TypeVar("T")
Progress = Callable[[str, float | None], None]


class Model(NamedTuple):
    """What the HTTP face needs of a model's folder; the first five arguments of `make_app` behind the engine."""

    tokenizer: Tokenizer
    template: ChatTemplate
    info: ModelInfo
    generation_config: dict[str, Any]
    settings: ApiSettings


def make_engine(settings: Config, key_share: float = 1.0, cache: Shares = WHOLE) -> Engine:
    """`key_share` and `cache` are what API keys may have of the queue and of the prefix cache."""
    return Engine(
        EngineSettings(
            rows=settings.running_max_req_size,
            chunk_budget=settings.batch_max_tokens,
            chunk_size=settings.chunked_prefill_size,
            prefix_cache=not settings.disable_dynamic_prompt_cache,
            policy=_policy(settings),
            queue=settings.max_queue,
            queue_tokens=settings.max_queue_tokens,
            key_share=key_share,
            service=Service(
                settings.schedule_order,
                settings.pause_order,
                settings.ttft_target,
                settings.gap_target,
                settings.queue_timeout,
            ),
            cache=cache,
        )
    )


async def find_model(settings: Config, progress: Progress) -> ModelFiles:
    """The model's files, which may have to be downloaded. Raises HubError; before a download or a conversion also where
    workers could not serve it."""
    dummy = settings.load_format == "dummy"
    model, revision = settings.model_dir or None, settings.revision or None
    check = partial(check_served, device=settings.device, ranks=settings.tp)
    find = partial(resolve, model, revision=revision, need_weights=not dummy, check=check, progress=progress)
    return await in_daemon_thread(find)


async def read_model(settings: Config, files: ModelFiles) -> Model:
    """Tokenizer, chat template and defaults. Raises TextError, OSError or ValueError for files that are no good."""
    tokenizer = await asyncio.to_thread(Tokenizer.load, files.folder, settings.split_special_tokens)
    tokenizer.eos_ids = frozenset(settings.eos_id) or tokenizer.eos_ids
    return Model(
        tokenizer,
        ChatTemplate.load(files.folder, settings.chat_template, tokenizer.named),
        ModelInfo(settings.model_name or (files.name,), int(time.time()), files.name),
        _generation_config(Path(files.folder)) if settings.generation_config == "auto" else {},
        ApiSettings(
            max_n=settings.max_n,
            allowed_origins=settings.allowed_origins,
            long_truncation_mode=settings.long_truncation_mode,
            log_prompts=settings.log_prompts,
            tool_call_parser=settings.tool_call_parser,
            reasoning_parser=settings.reasoning_parser,
            shown=shown(settings),
        ),
    )


def make_fleet(
    engine: Engine,
    settings: Config,
    files: ModelFiles,
    on_loading: Callable[[Loading], None],
    on_ready: Callable[[Ready], None],
    on_stopped: Callable[[str], None],
) -> Fleet:
    return Fleet(
        engine,
        WorkerSettings(
            folder=files.folder,
            load_format=settings.load_format,
            data_type=_data_type(settings),
            device=settings.device,
            ranks=settings.tp,
            rows=settings.running_max_req_size,
            slots=settings.max_total_token_num,
            mem_fraction=settings.mem_fraction,
            max_length=settings.max_req_total_len,
            chunk_budget=settings.batch_max_tokens,
            graphs=not settings.disable_cudagraph,
            threads=settings.threads,
        ),
        settings.max_restarts,
        settings.step_timeout,
        settings.record or None,
        settings.trace or None,
        on_loading=on_loading,
        on_ready=on_ready,
        on_stopped=on_stopped,
    )


def in_daemon_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """Run `work` in a thread that does not keep the process alive: a download may hang."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(outcome: Callable[[], None]) -> None:
        if not future.done():  # it is given up where the server stops first
            outcome()

    def run() -> None:
        try:
            outcome = partial(future.set_result, work())
        except Exception as error:  # noqa: BLE001  raised again by whoever awaits
            outcome = partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, daemon=True).start()
    return future


def _policy(settings: Config) -> Policy:
    """The admission policy that was asked for."""
    if settings.schedule_policy == "lightllm":
        return LightLLM(settings.router_token_ratio, settings.router_max_new_token_len)
    made: dict[str, Callable[[], Policy]] = {
        "past-future": PastFuture, "conservative": Conservative, "aggressive": Aggressive,
    }  # fmt: skip
    return made[settings.schedule_policy]()


def _data_type(settings: Config) -> str:
    """`auto` on a CPU may be int8 for the demo model alone: of no other it is known that it costs less than 1 %."""
    if settings.data_type == "auto" and settings.model_dir and settings.device == "cpu":
        return "fp32"
    return settings.data_type


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    values = json.loads(path.read_bytes()) if path.is_file() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object")
    return values
