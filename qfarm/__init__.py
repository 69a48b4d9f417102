"""qfarm: honest, fast, large-scale comparison of LLM quantization methods.

From Python: `load_store` reads what was measured, `run` measures. Both are light until they are called.
"""

__version__ = "0.1.0"

from qfarm.api import Results, load_store, run

__all__ = ["Results", "__version__", "load_store", "run"]
