"""The one exception that stands for a user's mistake, and what no message may hold."""

import os
import re

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL|WEBHOOK")
_LEAST = 6  # characters of a secret: a shorter value would be found in any text
_USER_INFO = re.compile(r"(?<=://)[^/\s'\"@]+(?:@[^/\s'\"@]+)*@(?=[\w\[])")
HIDDEN = "***"


class UserError(Exception):
    """Something a person can mend: the message says what is wrong, where, and what to do, in one line.

    The command line prints it without a traceback; everything else that is raised is a fault of ours. It holds no
    secrets (`redacted`).
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


def redacted(text: str) -> str:
    """A text without secrets: what environment variables hold whose names say so, and user names before a host."""
    secrets = {value for name, value in os.environ.items() if _SECRET.search(name.upper()) and len(value) >= _LEAST}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _USER_INFO.sub("", text)
