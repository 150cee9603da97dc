"""What a model thinks before it answers, between two tags at the beginning of its output."""

from typing import NamedTuple

from aiollm.text.parsers.source import SPACE, Reasoning, Source, Steps


class Style(NamedTuple):
    open: str
    close: str
    always: bool = False
    """Whether the output begins with it, tag or not, unless the prompt has closed it."""

    def opened_by(self, prompt: str, continued: str = "", wanted: bool = True) -> bool | None:
        """Whether the prompt leaves the model thinking; None where it is past that, or thoughts are not `wanted`.

        Of a message that is `continued` its own text decides.
        """
        if continued.strip():
            return True if continued.rfind(self.open) > continued.rfind(self.close) else None
        end = prompt.rstrip()
        if end.endswith(self.open):
            return True
        return self.always if wanted and not end.endswith(self.close) else None


def reasoning(source: Source, style: Style, opened: bool) -> Steps[None]:
    yield from source.run(SPACE)
    if not (yield from source.starts(style.open)) and not opened:
        return
    source.drop()
    if (yield from source.until((style.close,), Reasoning)):
        source.drop()
        yield Reasoning("")  # there may have been none, and still white space behind them is no content
