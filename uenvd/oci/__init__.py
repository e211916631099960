"""OCI registries and image layouts: references, manifests, transfer."""
