"""Training: `gbci_fast.training`. Stages, their data, and the loop that they share."""
