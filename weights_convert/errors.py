"""The one error of this package."""


class WeightsError(ValueError):
    """A weight file or tree that cannot be used: what is wrong with it, and what to do.

    Attributes:
        classes: with which the file would fit, where nothing but the last layer's size is wrong.
    """

    def __init__(self, message: str, classes: int | None = None) -> None:
        super().__init__(message)
        self.classes = classes


def shown(value: object, limit: int = 120) -> str:
    """Return ``value`` for an error message: printable, on one line and of bounded length."""
    text = value if isinstance(value, str) else repr(value)
    text = text[: limit + 1]
    if not text.isprintable():
        text = ascii(text)[1:-1]
    return text if len(text) <= limit else text[:limit] + "..."
