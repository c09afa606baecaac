"""`python -m launcher`: the command line, for environments whose scripts are not on the PATH."""

from launcher.cli import main

main()
