"""uenvd itself: control socket, services, supervisor of workers."""
