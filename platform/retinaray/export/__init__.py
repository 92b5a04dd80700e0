"""A trained model as portable files, checked against the original."""
