"""`python -m fmn`: the command line."""

from fmn.cli import main

main()
