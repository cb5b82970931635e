"""The frame and style that all pages share, and how numbers are written in them."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_UNKNOWN = "n/a"


def page_environment(*packages: str) -> Environment:
    """Templates of this package, which pages extend, and those of ``packages``."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ".") for package in (*packages, "mhmoe_vl.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "svg": Markup,
        "number": _number,
        "count": _count,
        "percent": _percent,
        "duration": _duration,
    }
    return environment


def _number(value: float | None, digits: int = 2) -> str:
    return _UNKNOWN if value is None else f"{value:,.{digits}f}"


def _count(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}"


def _duration(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else f"{seconds / 60:,.1f} min"


def _percent(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.1%}"
