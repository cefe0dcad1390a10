"""Prefect flows over fmn's stages; nothing in fmn imports them."""

from fmn.environment import settle_environment

settle_environment()  # before Prefect is imported
