"""Recipe -> image: the builder ``python``, and the audit that every image has to pass."""

from uenvd.publish.build.builder import Built, build

__all__ = ["Built", "build"]
