"""The report of a run and the comparison of methods: tables, pictures, pages, model cards."""

from typing import TYPE_CHECKING

from fmn.lazy import lazy

if TYPE_CHECKING:
    from fmn.report.stages import report as report

_MODULES = {
    "report": "stages",
}
__all__ = ["report"]
__getattr__ = lazy(__name__, _MODULES)
