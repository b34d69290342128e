"""The command line: a file for each command, and `app`, which lists them."""

from lisatune.cli.app import main as main
