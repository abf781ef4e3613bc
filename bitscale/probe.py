"""Held-out loss over λ."""
