"""aiollm: an LLM inference server in pure Python and Triton."""

__version__ = "0.1.0"
