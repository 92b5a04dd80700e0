"""Images and COCO annotations in, training batches out."""
