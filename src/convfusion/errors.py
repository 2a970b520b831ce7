"""The errors that a user's mistake raises; the command line prints them as one line."""


class ConvFusionError(ValueError):
    """Something asked for cannot be done; the message says what would work."""


class UnsupportedModelError(ConvFusionError, TypeError):
    """No adapter knows this model class, or it has no self-attention to replace."""


class CheckpointError(ConvFusionError):
    """A file is damaged, or does not belong to this model."""
