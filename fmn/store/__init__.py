"""Outputs on disk: whole or not there, beside what they were made from; records, settings."""

from fmn.store.records import Record, Settings
from fmn.store.stage import Outcome, run_stage

__all__ = ["Outcome", "Record", "Settings", "run_stage"]
