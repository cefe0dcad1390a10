"""The one exception that stands for a user's mistake, and what no message may hold."""

import os
import re

HIDDEN = "***"
_SECRET = re.compile(r"(TOKEN(?!IZERS)|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL|WEBHOOK)(?!\w*_(FILE|PATH|DIR)$)")
_LEAST = 6  # characters of a secret: a shorter value would be found in any text
_USER = re.compile(r"(\w+://)([^/\s'\"@]+(?:@[^/\s'\"@]+)*)@(?=[\w\[*])")
_QUERY = re.compile(r"(?i)([?&][\w-]*(?:token|key|password|secret|signature|sig)=)[^&\s'\"]+")


class UserError(Exception):
    """Something a person can mend: the message says what is wrong, where, and what to do, in one line.

    The command line prints it without a traceback; everything else that is raised is a fault of ours. It holds no
    secrets (`redacted`).
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


def redacted(text: str) -> str:
    """A text without secrets: the values of environment variables that are named like one, and those within addresses.

    Of an address go the user name and password before the host, and what a query calls a token, a key or the like.
    """
    secrets = {value for name, value in os.environ.items() if _SECRET.search(name.upper()) and len(value) >= _LEAST}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(_without_user, text))


def _without_user(address: re.Match[str]) -> str:
    scheme, user = address.groups()
    revision = scheme == "hf://" and ":" not in user  # hf://name@revision
    return address[0] if revision else scheme
