"""Adapters that register this package with other libraries; each imports its library when called, nothing before."""
