"""Perdure: one language model learns skill after skill from demonstrations and keeps what it knew."""

__version__ = "0.1.0"
