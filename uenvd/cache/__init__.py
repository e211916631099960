"""The content-addressed store of pulled images."""
