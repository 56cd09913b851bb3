"""What a trained detector does: its errors, its queries and patterns, its inside, and the report that shows them."""

from paqdetr.analysis.analyze import Report, analyze

__all__ = ["Report", "analyze"]
