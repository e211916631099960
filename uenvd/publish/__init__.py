"""uenvd-publish: builds, tests and publishes images."""
