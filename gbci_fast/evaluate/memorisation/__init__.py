"""Whether lesions of the training set come back."""
