"""The errors that a user's mistake raises; the command line prints them as one line."""

LONGEST = 2000  # characters of a message
LINE = 160  # and of what is quoted of another error


class ConvFusionError(ValueError):
    """Something asked for cannot be done; the message says what would work."""

    def __str__(self) -> str:
        text = super().__str__()  # which may quote a value from a file, of any length
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


class UnsupportedModelError(ConvFusionError, TypeError):
    """No adapter knows this model class, or it has no self-attention to replace."""


class CheckpointError(ConvFusionError):
    """A file is damaged, or does not belong to this model."""


def first_line(error: Exception) -> str:
    """The first line of another error's text, cut if it is long."""
    line = str(error).strip().partition("\n")[0]
    return line if len(line) <= LINE else f"{line[: LINE - 1]}…"
