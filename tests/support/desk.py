"""The registered model `NAME` of the tests of decisions, and what the registry says of it."""

from pipelines.tracking.decisions import look

NAME = "demo"


def aliases(client):
    return {key: str(value) for key, value in client.get_registered_model(NAME).aliases.items()}


def statuses(client):
    return [decision.status for decision in look(client, NAME).decisions]
