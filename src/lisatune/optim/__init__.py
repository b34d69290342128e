"""Optimizers that keep their promise when layers come and go."""
