"""uenvctl, the scientist's tool: one file per command, light imports."""
