"""What a model thinks before it answers, between two tags at the beginning of its output."""

from typing import NamedTuple

from aiollm.text.parsers.source import SPACE, Reasoning, Source, Steps


class Style(NamedTuple):
    open: str
    close: str
    always: bool = False
    """Whether the output begins with it, tag or not, unless the prompt has closed it."""

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt leaves the model thinking."""
        end = prompt.rstrip()
        return end.endswith(self.open) or (self.always and not end.endswith(self.close))


def reasoning(source: Source, style: Style, opened: bool) -> Steps[None]:
    yield from source.run(SPACE)
    if not (yield from source.starts(style.open)) and not opened:
        return
    source.drop()
    if (yield from source.until((style.close,), Reasoning)):
        source.drop()
