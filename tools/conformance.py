"""Holds constrained output to its JSON schemas: what a real server writes must validate with the `jsonschema` package.

    python tools/conformance.py --save tools/results/conformance.json

The server is a process over the demo model (or --model_dir); every schema of tests/schemas.json is asked for, several
at a time. An answer that reached its length limit says nothing: its schema is asked for again with another seed and, at
every second try, twice the tokens. Those where no try came to an end are shown, and make a failure as wrong ones do.
The result is written after each try: all of them take an hour on slow cores.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
from serving import Server

SCHEMAS = Path(__file__).parent.parent / "tests" / "schemas.json"
AT_ONCE = 8
TRIES = 8
TOKENS = 400
SECONDS = 3600.0  # for one answer: the last tries have thousands of tokens, and the machine may be busy


class Verdict(NamedTuple):
    """For how many schemas an answer ended by itself, those for which none did, and what did not validate."""

    ended: int
    cut: list[str]
    wrong: list[str]


def schemas() -> list[dict[str, Any]]:
    """Each a {"schema", "valid": instances}."""
    found: list[dict[str, Any]] = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    return found


def ask(server: Server, schema: Any, seed: int, tokens: int, **fields: Any) -> tuple[str, str]:
    """The text of a chat's answer under a schema, and why it ended."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    body = {
        "messages": [{"role": "user", "content": f"Answer with JSON for this schema: {json.dumps(schema)[:500]}"}],
        "max_tokens": tokens,
        "temperature": 1.0,
        "seed": seed,
        "response_format": form,
        **fields,
    }
    (choice,) = server.post("/v1/chat/completions", body, SECONDS)["choices"]
    return choice["message"]["content"], choice["finish_reason"]


def conformance(server: Server, cases: Sequence[dict[str, Any]], **fields: Any) -> Iterator[Verdict]:
    """Ask for every schema, in the same batch with others, again and again; what is known after each try."""
    wrong: list[str] = []
    left = list(range(len(cases)))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number in itertools.count():

            def answer(at: int, number: int = number) -> tuple[str, str]:
                seed, tokens = number * len(cases) + at, TOKENS << number // 2
                return ask(server, cases[at]["schema"], seed, tokens, **fields)

            answers = dict(zip(left, pool.map(answer, left), strict=True))
            for at, (text, reason) in answers.items():
                if problem := _problem(cases[at]["schema"], text, reason):
                    wrong.append(f"{json.dumps(cases[at]['schema'])}: {problem}: {text!r}")
            left = [at for at, (_, reason) in answers.items() if reason == "length"]
            print(f"try {number + 1}: {len(answers)} asked, {len(left)} cut, {len(wrong)} wrong", flush=True)
            yield Verdict(len(cases) - len(left), [json.dumps(cases[at]["schema"]) for at in left], wrong)


def _problem(schema: Any, text: str, reason: str) -> str:
    if reason == "length":
        return ""
    if reason != "stop":
        return f"it ended by {reason}"
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="constrained output validates with the jsonschema package")
    parser.add_argument("--model_dir", help="Hugging Face folder, hub id or .gguf file; the demo model without it")
    parser.add_argument("--save", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    began, cases = time.monotonic(), schemas()
    with Server(*(("--model_dir", args.model_dir) if args.model_dir else ())) as server:
        model = json.loads(server.get("/v1/models")[1])["data"][0]["id"]
        for tries, verdict in zip(range(1, TRIES + 1), conformance(server, cases), strict=False):
            result = {
                "what": "constrained output against the jsonschema package",
                "model": model,
                "schemas": len(cases),
                "tries": tries,
                "most_tokens": TOKENS << (tries - 1) // 2,
                **verdict._asdict(),
                "seconds": round(time.monotonic() - began),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "python": platform.python_version(),
                "date": time.strftime("%Y-%m-%d"),
            }
            if args.save:
                args.save.parent.mkdir(parents=True, exist_ok=True)
                args.save.write_text(json.dumps(result, indent=1) + "\n")
            if not verdict.cut:
                break
    print(json.dumps(result, indent=1))
    return 1 if verdict.wrong or verdict.cut else 0


if __name__ == "__main__":
    sys.exit(main())
