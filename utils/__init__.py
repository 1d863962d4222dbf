"""Plumbing that knows nothing of the method: files, data, devices, seeds, logging."""
