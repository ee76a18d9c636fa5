"""`python -m relufy`: the command line."""

from relufy.cli.main import main

main()
