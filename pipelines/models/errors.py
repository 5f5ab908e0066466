"""Errors about models and weights that the user can mend; each message is one line."""

from pipelines.errors import UserError


class ModelError(UserError, ValueError):
    """An architecture does not exist, does not take the given options, or does not fit its use."""


class WeightsError(UserError, ValueError):
    """A weights file is missing, altered, unsafe, or belongs to another network."""
