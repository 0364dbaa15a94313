"""`python -m moco.cli` is the command `moco`."""

from moco.cli.main import main

main()
