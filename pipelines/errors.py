"""The one kind of error that a person can mend."""


class UserError(Exception):
    """Bad input or a missing thing, in one line that names it and says what would be right.

    `pipelines.workflow.running.stage` shows that line alone, without a traceback.
    """
