"""Data: raw rows -> messages -> ids and labels -> packed rows -> batches."""
