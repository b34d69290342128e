"""Instruments of memory: a ledger, the measured peak, moving to the host, blocks of rows or columns."""
