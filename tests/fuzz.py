"""What /openapi.json says, asked at random by schemathesis: a server over workers that answer from a script.

    make fuzz      # 10,000 requests and more

No answer may be a server's error; statuses, content types and bodies have to be those that the document says.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from stand import MODEL, Stand, stand
from tiny_tokenizer import write_byte_tokenizer

from aiollm.api.caller import TIMEOUT
from aiollm.api.openapi import REFUSED
from aiollm.api.schema import INT32

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
)  # fmt: skip
QUIET = (
    "--no-color", "--warnings", "off", "--suppress-health-check", "all", "--no-shrink",
    "--generation-database", "none",  # with one, each request is compared with many before, which takes longest of all
)  # fmt: skip


async def fuzzed(served: Stand, examples: int, seed: int, folder: Path, phases: str) -> tuple[int, str]:
    """How many requests were answered, and what is wrong: empty where all is well.

    Inventing a request takes schemathesis ten times what the server takes to answer it, so each core has a process
    that asks for its part of the paths.
    """
    async with served.session.get(served.url + "/openapi.json") as response:
        document = await response.json()
    narrow(document)
    paths, parts = list(document["paths"].items()), os.cpu_count() or 1

    async def part(at: int) -> str:
        file = folder / f"openapi-{at}.json"
        file.write_text(json.dumps(document | {"paths": dict(paths[at::parts])}))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", served.url,
            "--checks", ",".join(CHECKS), "--phases", phases, "--max-examples", str(examples), "--seed", str(seed),
            *QUIET,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=folder,
        )  # fmt: skip
        output = (await process.communicate())[0].decode()
        return "" if process.returncode == 0 else f"{output}\nexit status {process.returncode}\n"

    wrong = await asyncio.gather(*map(part, range(min(parts, len(paths)))))
    (family,) = served.parts.metrics.responses.collect()
    answered = int(sum(sample.value for sample in family.samples if sample.name.endswith("_total")))
    return answered, "".join(wrong)


def narrow(value: Any) -> None:
    """Leave out what would be refused nearly always, so that requests reach what lies behind: fields that this server
    does not have, other models, ids outside the vocabulary, and too little time. Schemathesis asks for values that
    break the rules all the same."""
    if isinstance(value, dict):
        if "properties" in value:
            fields = value["properties"]
            value["properties"] = {name: each for name, each in fields.items() if each.get("description") != REFUSED}
            if "anyOf" in fields.get("model", ()):
                fields["model"]["anyOf"] = [{"enum": list(MODEL.names)}, {"type": "null"}]
        if "parameters" in value and isinstance(value["parameters"], list):
            value["parameters"] = [each for each in value["parameters"] if each["name"] != TIMEOUT]
        if value.get("type") == "integer" and value.get("maximum") == INT32:
            value["maximum"] = 40
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            narrow(item)


async def main(examples: int, seed: int, phases: str) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with stand(write_byte_tokenizer(folder)) as served:
            answered, wrong = await fuzzed(served, examples, seed, folder, phases)
    print(wrong or f"{answered:,} requests answered as /openapi.json says, none with a server's error")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ask what /openapi.json says at random.")
    parser.add_argument("--examples", type=int, default=400, help="requests for each operation, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", default="examples,coverage,fuzzing")
    given = parser.parse_args()
    sys.exit(asyncio.run(main(given.examples, given.seed, given.phases)))
