"""Clocks that jump: whatever measures time uses the monotonic clock, so that NTP and summer time change nothing."""

import ast

from tree import MODULES, ROOT

WALL = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.now", "datetime.datetime.now"}
# Where the time of day is what is wanted: it is told, and nothing waits or ends by it.
STAMPS = {
    "aiollm/api/access.py": "the time of a line in the access log",
    "aiollm/api/generation.py": "`created` of an answer",
    "aiollm/assembly.py": "when the model was loaded, in /v1/models",
    "aiollm/bench/serve.py": "the date of a report",
    "aiollm/text/chat.py": "strftime_now of chat templates",
    "kernels/measure.py": "the date of a table",
}


def test_nothing_waits_by_the_time_of_day() -> None:
    found = set()
    for path in MODULES.values():
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        if any(ast.unparse(call.func) in WALL for call in calls):
            found.add(str(path.relative_to(ROOT)))
    assert found == set(STAMPS)
