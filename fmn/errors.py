"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Something a person can mend: the message says what is wrong, where, and what to do, in one line.

    The command line prints it without a traceback; everything else that is raised is a fault of ours.
    """
