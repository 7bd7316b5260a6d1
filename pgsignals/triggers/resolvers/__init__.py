"""The models that pgsignals knows by itself; plugins add others."""

from __future__ import annotations

from ...core.tables import Resolver
from .django import DjangoResolver
from .plain import PlainResolver
from .sqlalchemy import SQLAlchemyResolver

BUILTIN: tuple[Resolver, ...] = (SQLAlchemyResolver(), DjangoResolver(), PlainResolver())

__all__ = ["BUILTIN", "DjangoResolver", "PlainResolver", "SQLAlchemyResolver"]
