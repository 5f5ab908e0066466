"""The error of a conversion that fails."""

from pipelines.errors import UserError


class ConversionError(UserError, ValueError):
    """A network that cannot be converted; the message names the module and says what to do, in one line."""
