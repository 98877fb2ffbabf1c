"""The compiled operators, which importing registers as `torch.ops.gbci_fast.*`; here for checkouts without a build."""
