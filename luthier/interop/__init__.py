"""Other suites' files: their configs in, their models in."""
