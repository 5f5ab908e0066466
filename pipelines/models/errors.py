"""Errors about models, for the user to mend: one line each."""

from pipelines.errors import UserError


class ModelError(UserError, ValueError):
    """An architecture that does not exist, does not take the options given, or does not fit its use."""


class WeightsError(UserError, ValueError):
    """A weights file that is missing, altered, unsafe or not of this network."""
