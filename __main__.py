"""`python -m onecard` is the command `onecard`."""

from .cli import main

main()
