"""The one kind of error that a person can mend, and text without the secrets of addresses."""

import re

# What is before the host, up to the last @. A password may hold a slash; what follows a colon and is all digits is a port.
_LOGIN = re.compile(r"(?<=://)(?:[^\s/?#]*|[^\s/?#:@\[]*:(?!\d+(?:[/?#]|$))[^\s\"'<>]*)@")
# A query or fragment, without the punctuation of the sentence around the address. Names of local files may have ? and # in them.
_ADDRESS = r"(?<![\w+.-])(?!file:|sqlite\b)[A-Za-z][\w+.-]*://[^\s?#\"'<>`]*[?#]"
_REST = r"(?:[^\s\"'<>`]|'(?=[\w%&=+/-]))*[^\s\"'<>`.,:;)\]}]"
_QUERY = re.compile(f"({_ADDRESS}){_REST}")


def redacted(text: str) -> str:
    """`text` without the secrets of the addresses in it: no `user:password@`, and `***` for all that follows a `?` or `#`.

    A presigned address has its signature in the query, under names that differ from store to store.
    """
    return _QUERY.sub(r"\1***", _LOGIN.sub("", text))


class UserError(Exception):
    """Bad input or a missing thing, in one line that names it and says what would be right; addresses in it are redacted.

    `pipelines.workflow.running.stage` shows that line alone, without a traceback.
    """

    def __str__(self) -> str:
        return redacted(super().__str__())
