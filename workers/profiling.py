"""What a worker does in some of its iterations, by torch.profiler: operations on the host, and kernels where there are
any. Nothing of it runs unless somebody asked for it."""

import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from aiollm.wire.messages import Profiled

log = logging.getLogger(__name__)


class Profiling:
    """Begins when it is made. The worker stands still for a moment as it begins and as it ends."""

    def __init__(self, until: int, with_stack: bool) -> None:
        """`until` is the iteration with whose post it is to end."""
        self.until = until
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        everywhere = _ExperimentalConfig(profile_all_threads=True)  # two threads launch, and a CPU's stream has its own
        self._profile = profile(activities=activities, with_stack=with_stack, experimental_config=everywhere)
        self._profile.start()

    def end(self, tell: Callable[[Profiled], None]) -> None:
        """End it, and tell the trace from another thread: writing it may take seconds."""
        try:
            self._profile.stop()
        except Exception as error:
            log.exception("a profile could not end")
            tell(Profiled(b"", f"the profile could not end: {error}"))
            return
        threading.Thread(target=lambda: tell(self._written()), name="profile", daemon=True).start()

    def _written(self) -> Profiled:
        try:
            with tempfile.TemporaryDirectory(prefix="aiollm-profile-") as folder:
                path = Path(folder) / "trace.json.gz"
                self._profile.export_chrome_trace(str(path))
                return Profiled(path.read_bytes())
        except Exception as error:
            log.exception("a profile could not be written")
            return Profiled(b"", f"the profile could not be written: {error}")
