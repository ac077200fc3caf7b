"""Losses as pure functions that return (sum, count), so that a mean over the global batch is exact."""
