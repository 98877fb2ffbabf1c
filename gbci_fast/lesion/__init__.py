"""The lesion as an object: one lesion, of which there may be many pictures."""
