"""Runs begun, watched and talked to in the browser: each click is a config file and a command. Needs no torch."""
