"""Memory forecasts, and what to do to fit."""
