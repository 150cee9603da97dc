"""The one error of this room: a model that cannot be found, fetched or converted, and what to do about it."""


class HubError(ValueError):
    """The message is written for the person who typed the command: it names the model and the way out."""
