"""Memory of each process when several share a model."""
