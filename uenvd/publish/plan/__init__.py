"""A site's plan: which images are to be built, tested and published for which machine. One model for everything that runs it."""

from uenvd.publish.plan.cell import DEFAULT_SITE, STAGES, Cell, Problem, Runner, Stage
from uenvd.publish.plan.model import Plan, load_plan

__all__ = ["DEFAULT_SITE", "STAGES", "Cell", "Plan", "Problem", "Runner", "Stage", "load_plan"]
