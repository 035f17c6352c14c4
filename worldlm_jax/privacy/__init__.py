"""Differential privacy: what is clipped and noised, by whose rules, and what it amounts to (docs/privacy.md)."""
