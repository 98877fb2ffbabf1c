"""Finds copies of training lesions among synthetic ones."""
