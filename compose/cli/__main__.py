"""`python -m compose.cli`: the same as `moveline`."""

from compose.cli import main

main()
