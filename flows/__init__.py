"""Prefect over fmn's stages; nothing in fmn knows of it."""

from fmn.cli import settle_environment

settle_environment()  # before Prefect is imported
