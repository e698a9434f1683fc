"""Operations that upstream writes in Triton, under its import paths."""
