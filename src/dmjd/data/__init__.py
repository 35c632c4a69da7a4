"""From a path or a name to batches of uint8 images and masks."""
