"""Device code: `algebra` holds every formula once, `portable` the Triton kernels that use it."""
