"""Building blocks of transformers under upstream's import paths."""
