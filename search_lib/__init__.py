"""The search itself, and everything of a search run: its scorers, files, flags and progress. No torch."""
