"""The one kind of error that a person can mend."""


class UserError(Exception):
    """Bad input or a missing thing: one line that names it and says what would be right. A stage shows that line alone."""
