"""What formats know of a request's functions."""

from collections.abc import Mapping
from typing import Any

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each function's arguments, by the function's name."""
