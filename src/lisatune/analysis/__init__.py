"""Reads the files of a finished run and draws them."""
