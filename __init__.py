"""onecard packs a mixture-of-experts model onto one GPU and proves how far the result is from the original."""

__version__ = "0.1.0"
