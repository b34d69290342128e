"""A run: built, kept, resumed, reported."""
