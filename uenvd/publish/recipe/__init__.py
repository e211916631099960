"""Recipes: a directory that says what is in an image -> checked values."""

from uenvd.publish.recipe.load import load_recipe
from uenvd.publish.recipe.model import (
    Environment,
    PythonBuild,
    Recipe,
    SourceBuild,
    SourcePackage,
    View,
)

__all__ = ["Environment", "PythonBuild", "Recipe", "SourceBuild", "SourcePackage", "View", "load_recipe"]
