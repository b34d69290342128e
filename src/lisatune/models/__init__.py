"""Models: loaded, checked, exported, asked."""
