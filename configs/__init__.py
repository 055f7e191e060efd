"""Data, no code: models, recipes and prompt sets."""
