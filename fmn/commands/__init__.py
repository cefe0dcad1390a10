"""The commands of `fmn` that are stage functions, and what commands print."""

from fmn.commands.stages import COMMANDS

__all__ = ["COMMANDS"]
