"""Levers that lower the peak of a run; each usable without the rest."""
