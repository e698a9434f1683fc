"""Operations under upstream's import paths."""
