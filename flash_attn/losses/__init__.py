"""Upstream's import path of the loss."""
