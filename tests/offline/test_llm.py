"""LLM and AsyncLLM over a real worker, beside a real server with the same model."""

import asyncio
import contextlib
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from children import alive, until, workers
from serving import Server

from aiollm import LLM, AsyncLLM, SamplingParams
from aiollm.hub.errors import HubError
from aiollm.offline.llm import result

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "threads": 1, "max_total_token_num": 20000, "max_num_seqs": 16, "tool_call_parser": "hermes",
}  # fmt: skip
QUESTION = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, **SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    with Server("--model_dir", str(folder), *flags) as running:
        yield running


def idle(llm: LLM) -> bool:
    core = llm._llm._current.parts.engine.core
    return core is not None and core.idle


def test_prompts_are_completed_as_the_server_completes_them(llm: LLM, server: Server) -> None:
    prompts = ["Hello", "x" * 300, "é你"]
    outputs = llm.generate(prompts, SamplingParams(n=2, max_tokens=20, seed=7, temperature=1.3, top_p=0.9, stop="q"))
    assert [output.prompt for output in outputs] == prompts
    for output in outputs:
        body = {"prompt": output.prompt, "n": 2, "max_tokens": 20, "seed": 7, "temperature": 1.3, "top_p": 0.9}
        answer = server.post("/v1/completions", body | {"stop": "q", "return_token_ids": True})
        for made, choice in zip(output.outputs, answer["choices"], strict=True):
            assert made.text == choice["text"] and made.token_ids == choice["token_ids"]
            assert (made.finish_reason, made.stop_reason) == (choice["finish_reason"], choice["stop_reason"])
            assert output.prompt_token_ids == choice["prompt_token_ids"] and made.index == choice["index"] and made.text
            assert made.logprobs is None and made.cumulative_logprob is None
        assert output.finished and output.num_cached_tokens <= len(output.prompt_token_ids)


def test_conversations_are_answered_as_the_server_answers_them(llm: LLM, server: Server) -> None:
    chats = [QUESTION, [{"role": "system", "content": "Be brief."}, *QUESTION]]
    outputs = llm.chat(chats, SamplingParams(max_tokens=12, seed=3, logprobs=2))
    for messages, output in zip(chats, outputs, strict=True):
        body = {"messages": messages, "max_tokens": 12, "seed": 3, "logprobs": True, "top_logprobs": 2}
        answer = server.post("/v1/chat/completions", body | {"return_token_ids": True})
        (made,), (choice,) = output.outputs, answer["choices"]
        assert made.text == choice["message"]["content"] and made.token_ids == choice["token_ids"]
        assert output.prompt_token_ids == answer["prompt_token_ids"]
        assert output.prompt is not None and output.prompt.endswith("Why?<|im_end|>\n<|im_start|>assistant\n")
        assert made.logprobs is not None
        for id, found, told in zip(made.token_ids, made.logprobs, choice["logprobs"]["content"], strict=True):
            assert found[id].logprob == pytest.approx(told["logprob"], abs=1e-4)
            likeliest = sorted(entry.logprob for entry in found.values() if entry.rank is not None)[::-1]
            assert likeliest == pytest.approx([top["logprob"] for top in told["top_logprobs"]], abs=1e-4)
    (one,) = llm.chat(QUESTION, SamplingParams(max_tokens=12, seed=3))
    assert one.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    unfinished = [*QUESTION, {"role": "assistant", "content": "Beca"}]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    (more,) = llm.chat(unfinished, SamplingParams(max_tokens=1), **fields)
    assert more.prompt is not None and more.prompt.endswith("assistant\nBeca")


def test_calls_are_told_beside_the_text_as_the_server_tells_them(llm: LLM, server: Server) -> None:
    city = {"type": "object", "properties": {"at": {"enum": [1]}}, "required": ["at"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "look", "parameters": city}}]
    fields: dict[str, Any] = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    params = SamplingParams(max_tokens=600, seed=2)
    (output,) = llm.chat(QUESTION, params, **fields)
    answer = server.post("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 600, "seed": 2} | fields)
    (made,), told = output.outputs, answer["choices"][0]["message"]
    assert made.message is not None and made.message["content"] is told["content"] is None
    (call,), (expected,) = made.message["tool_calls"], told["tool_calls"]
    assert call.keys() == expected.keys() and call["function"] == expected["function"]
    assert made.text.startswith("<tool_call>") and call["function"]["arguments"] in made.text
    (again,) = llm.chat([*QUESTION, made.message, *QUESTION], SamplingParams(max_tokens=3))
    assert again.outputs[0].message == {"role": "assistant", "content": again.outputs[0].text}
    first, *_, last = llm.stream(QUESTION, params, **fields)
    assert first.outputs[0].message is None and last.outputs[0].message is not None
    assert last.outputs[0].message["tool_calls"][0]["function"] == call["function"]
    assert llm.generate("x", SamplingParams(max_tokens=1))[0].outputs[0].message is None


def test_prompts_are_embedded_as_the_server_embeds_them(llm: LLM, server: Server) -> None:
    prompts = ["The owl", "x" * 300, "The owl and the pussy-cat"]
    outputs = llm.embed(prompts)
    told = server.post("/v1/embeddings", {"input": prompts})["data"]
    for prompt, output, expected in zip(prompts, outputs, told, strict=True):
        assert output.outputs.embedding == pytest.approx(expected["embedding"], abs=1e-4)
        assert output.prompt_token_ids == list(prompt.encode()) and output.finished
    (short,) = llm.embed({"prompt_token_ids": list(b"The owl")}, dimensions=5)
    assert short.outputs.embedding == pytest.approx(
        server.post("/v1/embeddings", {"input": "The owl", "dimensions": 5})["data"][0]["embedding"], abs=1e-4
    )
    with pytest.raises(ValueError, match=r"^dimensions: "):
        llm.embed("x", dimensions=10**6)
    with pytest.raises(ValueError, match=r"^prompts\[1\]: input: token id 999 is outside the vocabulary"):
        llm.embed([[1], [999]])
    assert llm.embed([]) == []


def test_every_token_has_its_logprob_those_of_the_stop_string_too(llm: LLM) -> None:
    (free,) = llm.generate("Hello", SamplingParams(max_tokens=40, seed=1, logprobs=1))
    text = free.outputs[0].text
    stop = next(text[at : at + 2] for at in range(3, len(text)) if text[at : at + 2].isascii())
    (output,) = llm.generate("Hello", SamplingParams(max_tokens=40, seed=1, logprobs=1, stop=stop))
    (made,) = output.outputs
    assert made.finish_reason == "stop" and made.stop_reason == stop and stop not in made.text
    assert made.logprobs is not None and len(made.logprobs) == len(made.token_ids) < 40
    assert made.cumulative_logprob == pytest.approx(
        sum(found[id].logprob for id, found in zip(made.token_ids, made.logprobs, strict=True))
    )
    for id, found in zip(made.token_ids, made.logprobs, strict=True):
        assert next(iter(found)) == id and max(entry.rank or 0 for entry in found.values()) == 1
        assert found[id].rank == 1 or len(found) == 2


def test_a_prompt_s_logprobs_are_those_that_the_server_tells(llm: LLM, server: Server) -> None:
    params = SamplingParams(max_tokens=2, seed=1, prompt_logprobs=2)
    for output, path, body in (
        (llm.generate("Hello", params)[0], "/v1/completions", {"prompt": "Hello"}),
        (llm.chat(QUESTION, params)[0], "/v1/chat/completions", {"messages": QUESTION}),
    ):
        answer = server.post(path, {"max_tokens": 2, "seed": 1, "prompt_logprobs": 2, **body})
        told = answer["prompt_logprobs"] if "messages" in body else answer["choices"][0]["prompt_logprobs"]
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is told[0] is None
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids) == len(told)
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], told[1:], strict=True)
        for id, found, expected in pairs:
            assert found is not None and next(iter(found)) == id and {str(key) for key in found} == expected.keys()
            for key, entry in found.items():
                assert entry.logprob == pytest.approx(expected[str(key)]["logprob"], abs=1e-4)
                assert entry.rank == expected[str(key)]["rank"]


def test_prompts_may_be_ids_or_vllms_dictionaries(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, temperature=0)
    (text,) = llm.generate("abc", params)
    forms: list[Any] = [[97, 98, 99], {"prompt": "abc"}, {"prompt_token_ids": [97, 98, 99]}, [[97, 98, 99]], ["abc"]]
    for form in forms:
        (output,) = llm.generate(form, params)
        assert output.outputs[0].token_ids == text.outputs[0].token_ids
        assert output.prompt_token_ids == [97, 98, 99]
        assert output.prompt in ("abc", None)
    assert llm.generate([]) == []


def test_more_prompts_than_a_server_lets_wait_come_out_in_order(llm: LLM) -> None:
    prompts = [f"{i} " * (1 + i % 7) for i in range(1500)]
    params = [SamplingParams(max_tokens=1 + i % 5, ignore_eos=True) for i in range(1500)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1 + i % 5 for i in range(1500)]


def test_a_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    params = SamplingParams(n=2, max_tokens=30, seed=5, logprobs=0)
    pieces = list(llm.stream("Hello", params))
    (whole,) = llm.generate("Hello", params)
    assert len(pieces) > 5 and [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for before, after in itertools.pairwise(pieces):
        for old, new in zip(before.outputs, after.outputs, strict=True):
            assert new.text.startswith(old.text) and new.token_ids[: len(old.token_ids)] == old.token_ids
    assert [made.text for made in pieces[-1].outputs] == [made.text for made in whole.outputs]
    assert [made.token_ids for made in pieces[-1].outputs] == [made.token_ids for made in whole.outputs]
    (last,) = pieces[-1].outputs[:1]
    assert last.logprobs is not None and len(last.logprobs) == 30
    *_, answer = llm.stream(QUESTION, SamplingParams(max_tokens=4, seed=1))
    assert answer.outputs[0].text == llm.chat(QUESTION, SamplingParams(max_tokens=4, seed=1))[0].outputs[0].text


def test_the_last_output_of_a_stream_is_whole_however_long_one_looks_at_another(llm: LLM) -> None:
    stream = llm.stream("Hello", SamplingParams(max_tokens=200, seed=5, ignore_eos=True))
    next(stream)
    until(lambda: idle(llm))
    (rest,) = stream
    assert rest.finished and len(rest.outputs[0].token_ids) == 200


def test_who_leaves_a_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("Hello", SamplingParams(max_tokens=1900, ignore_eos=True))
    next(stream)
    assert not idle(llm)
    stream.close()  # type: ignore[attr-defined]  # a generator, to its callers an iterator
    until(lambda: idle(llm))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": 9.0}, "temperature: expected `float` <= 2.0"),
        ({"stop_token_ids": [300]}, "stop_token_ids: token id 300 is outside the vocabulary"),
        ({"max_tokens": 3000}, "This model's maximum context length is 2048 tokens"),
        ({"n": 1000}, "n: at most 128"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens: 5 is more than the 4"),
    ],
)
def test_a_bad_field_is_named(llm: LLM, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        llm.generate("x", SamplingParams(**fields))
    with pytest.raises(ValueError, match=named):
        llm.chat(QUESTION, SamplingParams(**fields))
    with pytest.raises(ValueError, match=named):
        next(iter(llm.stream("x", SamplingParams(**fields))))


def test_what_was_never_a_field_is_refused(llm: LLM) -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="top_p: nan is not a finite number"):
        SamplingParams(top_p=float("nan"))
    with pytest.raises(TypeError, match="continue_last"):
        llm.chat(QUESTION, continue_last=True)
    with pytest.raises(ValueError, match="expected either prompt or prompt_token_ids, not multi_modal_data"):
        llm.generate({"multi_modal_data": "x"})
    with pytest.raises(ValueError, match="sampling_params: 2 for 1 prompts"):
        llm.generate("x", [SamplingParams(), SamplingParams()])


def test_a_bad_prompt_among_many_ends_them_all_and_says_which_it_is(llm: LLM) -> None:
    prompts: list[Any] = ["x" * 10] * 200
    prompts[150] = [5, 999]
    with pytest.raises(ValueError, match=r"prompts\[150\]: prompt: token id 999 is outside the vocabulary") as refused:
        llm.generate(prompts, SamplingParams(max_tokens=500, ignore_eos=True))
    assert refused.value.__cause__ is not None
    until(lambda: idle(llm))
    assert len(llm.generate("x")[0].outputs[0].token_ids) > 0


def test_a_bar_is_shown_where_it_is_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["x"] * 3, SamplingParams(max_tokens=1))  # stderr is no terminal here
    assert capsys.readouterr().err == ""
    llm.generate(["x"] * 3, SamplingParams(max_tokens=1), use_tqdm=True)
    assert "3/3" in capsys.readouterr().err


def test_threads_may_share_a_model(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, seed=2)
    expected = llm.generate("shared", params)[0].outputs[0].token_ids
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(llm.generate("shared", params)[0].outputs[0].token_ids))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


def test_a_killed_worker_costs_no_token(llm: LLM) -> None:
    params = SamplingParams(max_tokens=300, seed=9, ignore_eos=True)
    prompts = [f"{i}" * (5 * i + 1) for i in range(6)]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    (victim,) = workers(os.getpid())
    found: list[list[int]] = []
    thread = threading.Thread(
        target=lambda: found.extend(output.outputs[0].token_ids for output in llm.generate(prompts, params))
    )
    thread.start()
    until(lambda: not idle(llm))
    os.kill(victim, signal.SIGKILL)
    thread.join()
    assert found == expected and workers(os.getpid()) != [victim]


def test_settings_have_vllms_names_and_close_ends_the_workers(folder: Path) -> None:
    before = set(workers(os.getpid()))
    llm = LLM(model=folder, max_model_len=64, tensor_parallel_size=1, enforce_eager=True, max_restarts=0, **SETTINGS)
    with pytest.raises(ValueError, match="maximum context length is 64 tokens"):
        llm.generate("x" * 64)
    (worker,) = set(workers(os.getpid())) - before
    failures: list[BaseException] = []

    def run() -> None:
        try:
            llm.generate(["x"] * 1000, SamplingParams(max_tokens=60, ignore_eos=True))
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: not idle(llm))
    llm.close()
    assert not alive(worker)
    thread.join(20)
    assert len(failures) == 1
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("x")
    llm.close()


def test_a_model_whose_workers_do_not_come_back_says_why(folder: Path) -> None:
    before = set(workers(os.getpid()))
    with LLM(folder, max_restarts=0, **SETTINGS) as llm:
        (worker,) = set(workers(os.getpid())) - before
        stream = llm.stream("x", SamplingParams(max_tokens=1500, ignore_eos=True))
        next(stream)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"signal 9.*--max_restarts"):
            list(stream)
        with pytest.raises(RuntimeError, match=r"signal 9.*--max_restarts"):
            llm.generate("x")


def test_a_model_that_nobody_holds_ends_its_workers(folder: Path) -> None:
    before = set(workers(os.getpid()))
    llm = LLM(folder, **SETTINGS)
    (worker,) = set(workers(os.getpid())) - before
    del llm
    gc.collect()
    assert not alive(worker)


def test_what_cannot_be_loaded_says_why(folder: Path, tmp_path: Path) -> None:
    before = set(workers(os.getpid()))
    with pytest.raises(HubError, match="nowhere"):
        LLM(tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match="tp 4"):
        LLM(folder, tp=4, **SETTINGS)
    with pytest.raises(ValueError, match="did you mean max_model_len"):
        LLM(folder, max_modl_len=5)
    with pytest.raises(ValueError, match="port: of use only for a server"):
        LLM(folder, port=5)
    assert set(workers(os.getpid())) == before


def test_an_event_loop_goes_on_while_its_model_works(folder: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(folder, **SETTINGS) as llm:
            params = SamplingParams(max_tokens=200, seed=4, ignore_eos=True)

            async def last() -> list[int]:
                async for output in llm.stream("Hello", params):
                    found = output.outputs[0].token_ids
                return found

            streamed, listed = await asyncio.gather(last(), llm.generate(["Hello", "Hello"], params))
            assert [output.outputs[0].token_ids for output in listed] == [streamed] * 2
            call = asyncio.create_task(llm.generate(["x"] * 50, SamplingParams(max_tokens=1500, ignore_eos=True)))
            core = llm._current.parts.engine.core
            assert core is not None
            while core.idle:
                await asyncio.sleep(0.001)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
            async with asyncio.timeout(20):
                while not core.idle:
                    await asyncio.sleep(0.001)
        with pytest.raises(RuntimeError, match="not loaded"):
            await llm.generate("x")

    asyncio.run(main())


PROGRAM = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs in the background are told to ignore it
from pathlib import Path
sys.path.insert(0, {tests!r})
from children import workers
from aiollm import LLM, SamplingParams
import os
print("begins", flush=True)
llm = LLM({folder!r}, **{settings!r})
print(*workers(os.getpid()), flush=True)
{rest}
"""


def program(folder: Path, rest: str) -> subprocess.Popen[str]:
    """A program that says when it begins, then which worker it has, and goes on with `rest`."""
    source = PROGRAM.format(tests=str(Path(__file__).parent.parent), folder=str(folder), settings=SETTINGS, rest=rest)
    command = [sys.executable, "-c", source]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def first_worker(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return int(process.stdout.readline())


def test_a_program_that_ends_without_a_word_leaves_no_worker(folder: Path) -> None:
    with program(folder, "llm.generate('x')") as process:
        worker = first_worker(process)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and errors == ""
        assert not alive(worker)


def test_an_interrupt_ends_the_call_and_then_the_program_and_leaves_no_worker(folder: Path) -> None:
    long = "SamplingParams(max_tokens=1900, ignore_eos=True)"
    rest = f"""
try:
    for output in llm.stream("x", {long}):
        print("runs", flush=True)
except KeyboardInterrupt:
    print(len(llm.generate("x", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids), flush=True)
print("again", flush=True)
llm.generate(["x"] * 500, {long})
"""
    with program(folder, rest) as process:
        worker = first_worker(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        process.send_signal(signal.SIGINT)
        while (line := process.stdout.readline()) == "runs\n":
            pass
        assert (line, process.stdout.readline()) == ("3\n", "again\n")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        # Where the call had only just begun, Python may say of a coroutine that nobody has awaited it.
        said = errors.partition("\nsys:1: RuntimeWarning: coroutine")[0]
        assert process.returncode == -signal.SIGINT and said.rstrip().endswith("KeyboardInterrupt")
        assert errors.count("Traceback") == 1
        assert not alive(worker)


def test_an_interrupt_that_wakes_no_wait_is_heard_all_the_same() -> None:
    """As one that comes just before the wait: here another thread gets it."""
    future: Future[None] = Future()
    begins, raised = threading.Event(), threading.Event()
    main = threading.main_thread().ident
    assert main == threading.get_ident()

    def interrupt() -> None:
        begins.wait()
        while sys._current_frames()[main].f_code is not threading.Condition.wait.__code__:
            pass
        os.kill(os.getpid(), signal.SIGINT)
        raised.wait(20)
        future.set_result(None)

    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        begins.set()
        with pytest.raises(KeyboardInterrupt):
            result(future)
        assert not future.done()
    finally:
        raised.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_an_interrupt_while_the_model_loads_leaves_no_worker(folder: Path) -> None:
    with program(folder, "") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        until(lambda: workers(process.pid))
        (worker,) = workers(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGINT and errors.rstrip().endswith("KeyboardInterrupt")
        assert not alive(worker)
