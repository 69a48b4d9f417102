"""qfarm: honest, fast, large-scale comparison of LLM quantization methods."""

__version__ = "0.1.0"
