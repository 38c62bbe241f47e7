"""Original model checkpoints to the Hugging Face layout and back, with proof that the result is right."""

__version__ = "0.1.0"
