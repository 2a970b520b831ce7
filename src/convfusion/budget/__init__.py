"""Ranks where they matter: which mixer stands at which site, within a budget."""

from convfusion.budget.allocation import Allocation, Budget, SiteChoice, parse_budget
from convfusion.budget.choose import Allocations, choose_mixers, list_allocations
from convfusion.budget.measure import measure_moments
from convfusion.budget.moments import Moments, RatioError, Reach, ReachError, SiteMoments

__all__ = [
    "Allocation",
    "Allocations",
    "Budget",
    "Moments",
    "RatioError",
    "Reach",
    "ReachError",
    "SiteChoice",
    "SiteMoments",
    "choose_mixers",
    "list_allocations",
    "measure_moments",
    "parse_budget",
]
