"""Helpers under upstream's import paths."""
