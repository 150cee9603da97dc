"""argv -> Config -> one command; the server is assembled, told of, and stopped here."""

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from aiollm import __version__, arguments, config, garbage
from aiollm.hangup import on_hangup
from aiollm.listening import address, bound, is_private, private_socket
from aiollm.notify import Notifier, inherited_socket

log = logging.getLogger("aiollm")

T = TypeVar("T")
Progress = Callable[[str, float | None], None]

STOP_SECONDS = 15  # for the workers and the connections, after the last request
HERE = {
    "chat": "aiollm.chat",
    "batch": "aiollm.offline.batch",
    "completion": "aiollm.completion",
    "trace": "aiollm.trace",
    "key": "aiollm.api.key_file",
    "bench serve": "aiollm.bench.serve",
}
"""Commands that are a module's `main`."""
APART = {
    "tune": "aiollm.kernels.autotune",
    "convert": "aiollm.workers.convert",
    "models": "aiollm.workers.families.table",
    "bench static": "aiollm.workers.bench_static",
}
"""Commands of the workers' side: torch is loaded in a process of its own, never here."""
BENCH_USAGE = "usage: aiollm bench serve|static [flags]; each of the two has --help"


def main() -> int:
    """The command `aiollm`. What is heavy is imported once the arguments are known to be right."""
    argv = sys.argv[1:]
    words = 2 if argv[:1] == ["bench"] else 1
    command = " ".join(argv[:words])
    if command in HERE:
        run: Callable[[list[str]], int] = importlib.import_module(HERE[command]).main
        return run(argv[words:])
    if command in APART:
        os.execv(sys.executable, [sys.executable, "-m", APART[command], *argv[words:]])
    if argv[:1] == ["bench"]:
        asked = argv[1:] in (["--help"], ["-h"])
        print(BENCH_USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    settings = arguments.parse(argv, os.environ)
    if argv[:1] == ["doctor"]:
        from aiollm import doctor

        return doctor.main(settings)
    settings = config.resolved(settings, config.device(settings.device))
    _set_up_logging(settings)
    import uvloop

    from aiollm.console import Console
    from aiollm.hub.errors import HubError

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # shells allow 1024, and each connection takes one
    console, notifier = Console(), Notifier(os.environ)
    try:
        return uvloop.run(serve(settings, lambda: _reread(argv, settings.device), console, notifier))
    except (HubError, OSError, ValueError) as error:
        console.close()
        print(f"aiollm: {error}", file=sys.stderr)
        notifier.status(str(error))
        return 1


async def serve(settings: config.Config, reread: Callable[[], config.Config], console: Any, notifier: Notifier) -> int:
    """Listen, find the model, start the workers, and serve until a signal; the exit status. `reread` gives the settings
    as they are after a SIGHUP, or raises ValueError."""
    from aiollm import assembly, tls
    from aiollm.api.app import make_door
    from aiollm.api.app import serve as listen
    from aiollm.api.keys import Keys
    from aiollm.wire.messages import Loading

    context = tls.made(settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_ca_certs)
    keys = Keys(settings.api_key, _key_file(settings))
    engine = assembly.make_engine(settings, *_shares(settings, keys))

    def progress(phase: str, fraction: float | None) -> None:
        console.progress(phase, fraction)
        notifier.loading(phase, fraction)
        engine.on_loading(Loading(phase, fraction or 0.0))

    console.say(f"aiollm {__version__}")
    stop = _Stop()
    on_hangup(lambda: _reload(settings, reread, keys, context, engine, console), stop.signal)
    with contextlib.ExitStack() as sockets:
        sock = sockets.enter_context(inherited_socket(os.environ) or bound(settings.host, settings.port))
        path = settings.admin_socket
        admin = sockets.enter_context(private_socket(path)) if path else None
        url = address(sock, "https" if context else "http")
        console.say(f"listening on {url}; /ready tells when the model is loaded")
        if keys.open and not is_private(sock) and not settings.ssl_ca_certs:
            console.say("whoever reaches this address is served; --api_key asks for a key")
        _warn_of_no_keys(settings, keys)
        entrance = await listen(make_door(engine, keys), settings.host, settings.port, sock, tls=context)
        try:
            files = await stop.unless(stop.first, assembly.find_model(settings, progress))
            console.close()
            if files is not None:
                console.say(f"model {files.name}: {files.origin}, in {files.folder}")
                await _serve_model(
                    settings, engine, url, entrance, admin, keys, files, progress, stop, console, notifier
                )
        finally:
            await entrance.cleanup()
    if stop.error:
        print(f"aiollm: {stop.error}", file=sys.stderr)
        notifier.status(stop.error)
        return 1
    console.say("stopped")
    return 0


async def _serve_model(
    settings: config.Config, engine: Any, url: str, entrance: Any, admin: socket.socket | None, keys: Any, files: Any,
    progress: Progress, stop: "_Stop", console: Any, notifier: Notifier,
) -> None:  # fmt: skip
    """Start the workers and serve until a signal, or until no worker comes back."""
    import msgspec

    from aiollm import assembly
    from aiollm.api.admin import make_admin
    from aiollm.api.app import make_app
    from aiollm.api.app import serve as listen
    from aiollm.api.parts import METRICS, PARTS
    from aiollm.console import budget, length, precision, sampling
    from aiollm.wire.messages import Ready

    def on_ready(ready: Ready) -> None:
        console.close()
        if gc.isenabled():  # nobody is served yet
            garbage.settle()
        longest = engine.core.limits.longest if engine.core is not None else ready.max_length
        told = [*precision(settings.data_type, ready.data_type), *sampling(msgspec.structs.asdict(app[PARTS].defaults))]
        lowered = length(settings.max_req_total_len, longest)
        for line in [*budget(ready, longest), *lowered, *told]:
            console.say(line)
        if ready.unread:
            console.say(f"config.json: nobody read {', '.join(ready.unread)}")
        began = console.started if fleet.restarted is None else fleet.restarted
        console.say(f"ready after {time.monotonic() - began:.1f} s: {url}/v1")
        notifier.ready(f"serving {model.info.names[0]} on {url}")

    fleet = assembly.make_fleet(
        engine,
        settings,
        files,
        on_loading=lambda loading: progress(loading.phase, loading.fraction),
        on_ready=on_ready,
        on_stopped=stop.fail,
    )
    operators = None
    watch = asyncio.create_task(notifier.watch(lambda: engine.pulse))
    cleaning = None
    try:
        fleet.spawn()  # before the tokenizer is read: importing torch takes as long
        read = await stop.unless(stop.first, assembly.read_model(settings, files))
        if read is None:
            return
        model = read
        app = make_app(engine, *model, keys)
        await entrance.lead_to(app)
        if admin is not None:
            operators = await listen(make_admin(engine, app[METRICS], fleet), settings.host, settings.port, admin)
        fleet.start(await asyncio.to_thread(lambda: model.tokenizer.vocabulary))
        cleaning = asyncio.create_task(garbage.collect_at_rest(lambda: engine.core is None or engine.core.idle))
        await stop.first.wait()
        if not stop.error:
            notifier.stopping(settings.drain_timeout + STOP_SECONDS, "letting running requests end")
            console.say(f"draining for at most {settings.drain_timeout:g} s; a second signal stops at once")
            await stop.unless(stop.second, engine.drain(settings.drain_timeout))
    finally:
        engine.on_stopped(stop.error or "the server is shutting down")
        if stop.second.is_set():
            fleet.kill()
        await fleet.stop()
        if operators is not None:
            await operators.cleanup()
        watch.cancel()
        if cleaning is not None:
            cleaning.cancel()


class _Stop:
    """SIGTERM and SIGINT: the first one drains, the second one stops at once. A dead fleet stops too."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.error = ""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.signal)

    def signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    def fail(self, error: str) -> None:
        self.error = error
        self.first.set()

    async def unless(self, event: asyncio.Event, work: Awaitable[T]) -> T | None:
        """What `work` gives, or None if the event comes first: then the work is given up."""
        task = asyncio.ensure_future(work)
        waiting = asyncio.ensure_future(event.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            return task.result()
        task.cancel()
        return None


def _set_up_logging(settings: config.Config) -> None:
    """Everything goes to stderr; lines of the access log stand there bare."""
    from aiollm.api.access import lines

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return record.getMessage() if record.name == lines.name else super().format(record)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    lines.disabled = settings.access_log == "off"


def _reread(argv: list[str], device: str) -> config.Config:
    """The settings as flags, environment and file have them now; ValueError where they cannot be read."""
    try:
        return config.resolved(arguments.parse(argv, os.environ), device)
    except SystemExit:
        raise ValueError("the settings have an error") from None  # which was said on stderr


async def _reload(
    settings: config.Config, reread: Callable[[], config.Config], keys: Any, context: Any, engine: Any, console: Any
) -> None:
    """Take over what may change while the server runs. All of it, or nothing where there is an error."""
    from aiollm import tls

    def read() -> tuple[config.Config, Mapping[str, Any] | None]:
        fresh = reread()
        file = _key_file(fresh)
        tls.made(settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_ca_certs)  # the files that are there now
        return fresh, file

    try:
        fresh, file = await asyncio.to_thread(read)
        keys.replace(fresh.api_key, file)
        if context is not None:
            tls.load(context, settings.ssl_certfile, settings.ssl_keyfile)
    except (OSError, ValueError) as error:
        log.error("SIGHUP changes nothing: %s", error)
        return
    engine.share(*_shares(fresh, keys))
    _warn_of_no_keys(fresh, keys)
    logging.getLogger().setLevel(fresh.log_level.upper())
    certificate = ", certificate" if context is not None else ""
    console.say(f"SIGHUP: {len(keys)} API keys{certificate}, log level {fresh.log_level}")
    if others := [n for n in config.FIELDS.keys() - config.LIVE if getattr(fresh, n) != getattr(settings, n)]:
        log.warning("a new start would change %s too", ", ".join(sorted(others)))


def _key_file(settings: config.Config) -> Mapping[str, Any] | None:
    """The keys in --api_key_file, if there is one. Raises ValueError, which names the file."""
    from aiollm import yaml_file
    from aiollm.api.key_file import entries

    path = settings.api_key_file
    if not path:
        return None
    try:
        values, lines = yaml_file.located(path)
    except OSError as error:
        raise ValueError(f"--api_key_file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return entries(path, values, lines)


def _warn_of_no_keys(settings: config.Config, keys: Any) -> None:
    if not keys.open and not len(keys):
        log.warning("%s holds no keys: nobody is served", settings.api_key_file)


def _shares(settings: config.Config, keys: Any) -> tuple[float, Any]:
    """What one key may have of the queue, and what keys may keep of the prefix cache."""
    from aiollm.engine.share import Shares

    queue = settings.max_queue_share if len(keys) > 1 else 1.0
    return queue, Shares(settings.cache_share, keys.cache_shares)


if __name__ == "__main__":
    sys.exit(main())
