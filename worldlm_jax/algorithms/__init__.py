"""Algorithms: each a rule for the backbone and a rule for the key layers."""
