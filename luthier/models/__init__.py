"""Models: loading, the attention seam, the stage a run trains, generation."""
