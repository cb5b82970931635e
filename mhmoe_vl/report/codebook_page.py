"""The health of a visual tokenizer as a page of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mhmoe_vl
from mhmoe_vl.analysis.codebook.health import CodebookHealth
from mhmoe_vl.report.codebook import view_codebook
from mhmoe_vl.report.template import page_environment


def render_codebook(
    health: CodebookHealth,
    *,
    training: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    command: str,
) -> str:
    """One HTML document that needs no other file and no network; the same health gives the same bytes.

    Args:
        training, held_out: records of the tokenizer's own training; empty if it had none.
        command: the command line that made the page.
    """
    return (
        page_environment()
        .get_template("codebook_page.html.jinja")
        .render(
            title=f"Visual tokenizer {health.tokenizer}",
            view=view_codebook(health, training=training, held_out=held_out),
            command=command,
            version=mhmoe_vl.__version__,
        )
    )
