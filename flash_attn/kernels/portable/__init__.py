"""Triton kernels that run the whole feature set on any hardware Triton compiles for."""
