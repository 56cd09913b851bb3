"""The bundled data set: scenes of real handwritten digits, made from what scikit-learn ships."""

from paqdetr.data.digits.edition import make_digits

__all__ = ["make_digits"]
