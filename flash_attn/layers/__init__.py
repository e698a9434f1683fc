"""Layers under upstream's import paths."""
