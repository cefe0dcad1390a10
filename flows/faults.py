"""Faults that pass by themselves, told apart from those that somebody has to mend."""

import sqlite3

from fmn.errors import UserError, redacted
from fmn.store.machine import origins

STATUSES = (408, 429, 500, 502, 503, 504)
# The HTTP clients' own, by name: there are three of them, each heavy to import and only one of them in use.
_NETWORK = ("TransportError", "ConnectionError", "Timeout", "ChunkedEncodingError", "RetryError")
_CLIENTS = ("httpx", "httpx2", "requests")


class PassingError(UserError):
    """No mistake of the user's, and perhaps none the next time: what failed is worth another try."""


class UnforeseenError(Exception):
    """A fault of ours, as a worker process tells it."""


def passes(error: BaseException) -> bool:
    """Whether an error comes of the network, of a server that is overtaxed or broken, or of a locked database.

    Or of a file that was there and is not: DVC removes what it is about to make again. One that was never there is a
    UserError.
    """
    if isinstance(error, FileNotFoundError):
        return True
    chain = list(origins(error))
    if any(isinstance(one, MemoryError) for one in chain):
        return False
    # MLflow says of every fault of its database that it may pass; SQLite knows better.
    database = [one for one in chain if isinstance(one, sqlite3.OperationalError)]
    if database:
        return any("locked" in str(one) or "busy" in str(one) for one in database)
    return any(map(_of_the_network, chain))


def _of_the_network(error: BaseException) -> bool:
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    return (
        isinstance(error, PassingError | ConnectionError | TimeoutError)
        or getattr(getattr(error, "response", None), "status_code", None) in STATUSES
        or getattr(error, "error_code", None) == "TEMPORARILY_UNAVAILABLE"  # MLflow's
        or any(client in _CLIENTS and name in _NETWORK for client, name in kinds)
    )


def one_line(error: BaseException) -> str:
    """What an error says: a user's mistake as it stands, anything else with its type."""
    return redacted(
        " ".join(
            (str(error) if isinstance(error, UserError | UnforeseenError) else repr(error)).split()
        )
    )
