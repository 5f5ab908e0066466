"""`UserError`, the base class of errors that a user can mend; redaction of secrets in addresses."""

import re

# The login before the host, up to the last @. A password may hold a slash. A colon and digits are a port.
_LOGIN = re.compile(r"(?<=://)(?:[^\s/?#]*|[^\s/?#:@\[]*:(?!\d+(?:[/?#]|$))[^\s\"'<>]*)@")
# A query or fragment, without the punctuation of the sentence around the address. Local files are left alone,
# because their names may have ? and # in them.
_ADDRESS = r"(?<![\w+.-])(?!file:|sqlite\b)[A-Za-z][\w+.-]*://[^\s?#\"'<>`]*[?#]"
_REST = r"(?:[^\s\"'<>`]|'(?=[\w%&=+/-]))*[^\s\"'<>`.,:;)\]}]"
_QUERY = re.compile(f"({_ADDRESS}){_REST}")


def redacted(text: str) -> str:
    """Returns `text` with the logins of addresses removed, and with `***` for their queries and fragments.

    A presigned address has its signature in the query, under names that differ from store to store.
    """
    return _QUERY.sub(r"\1***", _LOGIN.sub("", text))


class UserError(Exception):
    """Bad input or a missing thing, in one line that names it and says what would be right.

    `pipelines.workflow.running.stage` shows that line alone, without a traceback. Addresses are redacted.
    """

    def __str__(self) -> str:
        return redacted(super().__str__())
