"""The four operators: what they compute, who computes them, and why another one cannot."""

from .contract import MOST_HEADS, OPERATORS, SCHEMAS

__all__ = ["MOST_HEADS", "OPERATORS", "SCHEMAS"]
