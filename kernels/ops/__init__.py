"""Fused operators, one per file, each with its plain PyTorch reference beside it."""


def load_extension() -> None:
    """Registers the compiled operators, `torch.ops.gbci_fast.*`.

    Raises:
        ImportError: gbci_fast._C is not built, or was built for another torch.
    """
    try:
        import torch  # noqa: F401  its libraries must be loaded first

        import gbci_fast._C  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the compiled operators of gbci_fast cannot be loaded ({error}); "
            "build them with: pip install --no-build-isolation -e ."
        ) from error
