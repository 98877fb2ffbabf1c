"""How good the images are: measured against held-out truth, with everything needed to repeat the measurement."""
