"""Instant checks of the exercises: `check("name", fn)` says which properties of a student's function hold or broke."""

from common import checks_dpo, checks_orpo  # noqa: F401 - each registers its own
from common.exercises import CHECKS, check  # noqa: F401
