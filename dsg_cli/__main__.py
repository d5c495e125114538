"""`python -m dsg_cli` is `dsg`."""

from __future__ import annotations

from dsg_cli.cli.app import main

main()
