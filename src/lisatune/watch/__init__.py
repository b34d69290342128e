"""Runs in the browser: what a page shows of them, and the server that hands it out. Needs no torch."""
