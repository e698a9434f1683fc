"""Gluon kernels for Hopper (sm_90): warp-specialised pipelines around the formulas of `kernels.algebra`."""
