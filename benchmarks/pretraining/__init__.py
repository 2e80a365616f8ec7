"""Losses of models trained from scratch."""
