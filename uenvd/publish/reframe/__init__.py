"""ReFrame: what an image says of its tests, the site configuration for them, their run, their report."""
