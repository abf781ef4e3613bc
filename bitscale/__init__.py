"""bitscale: 16-bit pretraining that turns into 1.58-bit quantization-aware training mid-run."""

__version__ = "0.1.0"
