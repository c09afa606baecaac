"""`python -m launcher`: the command line, for environments in which `launcher` is not on the PATH."""

from launcher.cli import main

main()
