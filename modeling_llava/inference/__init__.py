"""Using a model: loading it from any kind of folder, asking it."""

from .decoding import model_lock
from .decoding_settings import DecodingSettings
from .loading import load_model
from .predictor import Answer, LlavaPredictor


__all__ = ["Answer", "DecodingSettings", "LlavaPredictor", "load_model", "model_lock"]
