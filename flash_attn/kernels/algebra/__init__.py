"""Device functions that state each formula once. They create no shapes, so Triton and Gluon kernels both call them."""
