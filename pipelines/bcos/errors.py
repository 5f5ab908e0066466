"""Errors about conversions, for the user to mend: one line each."""

from pipelines.errors import UserError


class ConversionError(UserError, ValueError):
    """A network that cannot be converted: one line that names the module and what to do."""
