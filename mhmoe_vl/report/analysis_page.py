"""An analysis of experts as a page of its own."""

from __future__ import annotations

import mhmoe_vl
from mhmoe_vl.analysis.result import ExpertAnalysis
from mhmoe_vl.report.experts import view_analysis
from mhmoe_vl.report.template import page_environment


def render_analysis(analysis: ExpertAnalysis, *, command: str) -> str:
    """One HTML document that needs no other file and no network; the same analysis gives the same bytes.

    Args:
        command: the command line that made it.
    """
    return (
        page_environment()
        .get_template("analysis.html.jinja")
        .render(
            title=f"Experts of {analysis.run}",
            view=view_analysis(analysis),
            command=command,
            version=mhmoe_vl.__version__,
        )
    )
