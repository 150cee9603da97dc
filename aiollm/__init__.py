"""aiollm: an LLM inference server in pure Python and Triton."""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's, without loading it
if TYPE_CHECKING:
    from aiollm.offline.async_llm import AsyncLLM as AsyncLLM
    from aiollm.offline.llm import LLM as LLM
    from aiollm.offline.outputs import CompletionOutput as CompletionOutput
    from aiollm.offline.outputs import EmbeddingOutput as EmbeddingOutput
    from aiollm.offline.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from aiollm.offline.outputs import Logprob as Logprob
    from aiollm.offline.outputs import RequestOutput as RequestOutput
    from aiollm.offline.outputs import SamplingParams as SamplingParams


def __getattr__(name: str) -> object:
    """What programs use, loaded when it is asked for: commands and workers go without it."""
    homes = {"LLM": "llm", "AsyncLLM": "async_llm"} | dict.fromkeys(
        ("CompletionOutput", "EmbeddingOutput", "EmbeddingRequestOutput", "Logprob", "RequestOutput", "SamplingParams"),
        "outputs",
    )
    if name not in homes:
        raise AttributeError(f"module 'aiollm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"aiollm.offline.{homes[name]}"), name)
