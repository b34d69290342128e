"""``python -m lisatune``."""

from lisatune.cli import main

main()
