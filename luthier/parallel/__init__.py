"""The place of this process among those of a run, and how work is cut between them."""
