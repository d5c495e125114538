"""`python -m dsg_cli` is `dsg`."""

from dsg_cli.cli.app import main

main()
