"""An image tree served to the kernel: tree, transports, worker process."""
