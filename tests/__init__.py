"""Not a namespace: some installed packages bring a `tests` of their own, which would come before one."""
