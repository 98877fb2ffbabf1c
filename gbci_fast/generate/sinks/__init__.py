"""Writers of one synthetic image each."""
