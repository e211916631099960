"""Recipe -> image: the builders ``python``, ``source`` and ``stackinator``, and the audit of what they make."""

from uenvd.publish.build.builder import Built, build
from uenvd.publish.build.kinds import Builder, Site, builder_of, identity

__all__ = ["Builder", "Built", "Site", "build", "builder_of", "identity"]
