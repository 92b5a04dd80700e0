"""What anchors can reach: coverage of the ground truth, and anchors fitted to it."""
