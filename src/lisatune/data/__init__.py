"""Rows of any usual format to batches of token ids: formats, tokenize, packing, loader, in that order."""
