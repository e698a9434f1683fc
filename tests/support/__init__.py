"""Cases, inputs, tolerance and exact probes, shared by every test tier."""
