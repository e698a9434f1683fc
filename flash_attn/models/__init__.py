"""Whole models and the names of their checkpoints: upstream's import paths and meaning. transformers loads when needed."""
