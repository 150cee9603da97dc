"""argv -> Config -> assemble -> run: the only file that knows all parts."""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from aiollm import __version__, config


def main() -> int:
    """The command `aiollm`. What is heavy is imported once the arguments are known to be right."""
    settings = config.parse(sys.argv[1:], os.environ)
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    import uvloop

    from aiollm.console import Console
    from aiollm.hub.errors import HubError
    from aiollm.text.folder import TextError

    console = Console()
    try:
        return uvloop.run(serve(settings, console))
    except (HubError, TextError, OSError, ValueError) as error:
        console.close()
        print(f"aiollm: {error}", file=sys.stderr)
        return 1


async def serve(settings: config.Config, console: Any) -> int:
    """Find the model, listen, start the workers, and serve until a signal; the exit status."""
    from aiollm.api.app import make_app
    from aiollm.api.app import serve as listen
    from aiollm.api.parts import ModelInfo
    from aiollm.console import budget
    from aiollm.engine import engine as core
    from aiollm.engine.scheduler import aggressive, worst_case
    from aiollm.fleet.fleet import Fleet
    from aiollm.hub.resolve import resolve
    from aiollm.text.chat import ChatTemplate
    from aiollm.text.tokenizer import Tokenizer
    from aiollm.wire.messages import Loading, Ready, WorkerSettings

    console.say(f"aiollm {__version__}")
    with _bound(settings.host, settings.port) as sock:  # before minutes of loading
        files = await asyncio.to_thread(
            resolve,
            settings.model_dir or None,
            revision=settings.revision or None,
            need_weights=settings.load_format != "dummy",
            progress=console.progress,
        )
        console.close()
        console.say(f"model {files.name}: {files.origin}, in {files.folder}")
        folder = Path(files.folder)
        tokenizer = await asyncio.to_thread(Tokenizer.load, files.folder)
        tokenizer.eos_ids = frozenset(settings.eos_id) or tokenizer.eos_ids
        engine = core.Engine(
            core.Settings(
                rows=settings.running_max_req_size,
                chunk_budget=settings.chunked_prefill_size,
                chunk_size=settings.chunked_prefill_size,
                prefix_cache=not settings.disable_dynamic_prompt_cache,
                predict=aggressive if settings.schedule_policy == "aggressive" else worst_case,
                queue=settings.max_queue,
            )
        )
        names = settings.model_name or (files.name,)
        app = make_app(
            engine,
            tokenizer,
            ChatTemplate.load(files.folder),
            ModelInfo(names, int(time.time()), files.name),
            _generation_config(folder),
        )
        runner = await listen(app, settings.host, settings.port, sock)
        url = f"http://{_host(settings.host)}:{sock.getsockname()[1]}"
        console.say(f"listening on {url}; /ready tells when the model is loaded")
        stop = _Stop()

        def on_loading(loading: Loading) -> None:
            console.progress(loading.phase, loading.fraction)

        def on_ready(ready: Ready) -> None:
            console.close()
            for line in budget(ready):
                console.say(line)
            if ready.unread:
                console.say(f"config.json: nobody read {', '.join(ready.unread)}")
            console.say(f"ready after {time.monotonic() - console.started:.1f} s: {url}/v1")

        fleet = Fleet(
            engine,
            WorkerSettings(
                folder=files.folder,
                load_format=settings.load_format,
                data_type=settings.data_type,
                device=_device(settings.device),
                ranks=settings.tp,
                rows=settings.running_max_req_size,
                slots=settings.max_total_token_num,
                mem_fraction=settings.mem_fraction,
                max_length=settings.max_req_total_len,
                chunk_budget=settings.chunked_prefill_size,
                threads=settings.threads,
            ),
            settings.max_restarts,
            settings.record or None,
            on_loading=on_loading,
            on_ready=on_ready,
            on_stopped=stop.fail,
        )
        fleet.start()
        try:
            await stop.first.wait()
            if not stop.error:
                console.say(f"draining for at most {settings.drain_timeout:g} s; a second signal stops at once")
                await stop.unless_second(engine.drain(settings.drain_timeout))
        finally:
            engine.on_stopped(stop.error or "the server is shutting down")
            if stop.second.is_set():
                fleet.kill()
            await fleet.stop()
            await runner.shutdown()
            await runner.cleanup()
        if stop.error:
            print(f"aiollm: {stop.error}", file=sys.stderr)
            return 1
        console.say("stopped")
        return 0


class _Stop:
    """SIGTERM and SIGINT: the first one drains, the second one stops at once. A dead fleet stops too."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.error = ""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    def fail(self, error: str) -> None:
        self.error = error
        self.first.set()

    async def unless_second(self, work: Any) -> None:
        """Await `work`, or give it up at the second signal."""
        task = asyncio.ensure_future(work)
        second = asyncio.ensure_future(self.second.wait())
        await asyncio.wait([task, second], return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        second.cancel()


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket; OSError names the flag that helps."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}; see --host and --port") from error


def _host(host: str) -> str:
    """The host of a URL that reaches this server from here."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def _device(name: str) -> str:
    """`auto` is a GPU where the NVIDIA driver is loaded."""
    if name != "auto":
        return name
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    values = json.loads(path.read_bytes()) if path.is_file() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object")
    return values


if __name__ == "__main__":
    sys.exit(main())
