"""Typed configuration. (Helper H3 owns this file.)"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every configuration section: frozen, unknown keys refused, attribute docstrings shown in help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
