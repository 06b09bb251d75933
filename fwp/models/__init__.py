"""Models: one decoder for all rules."""

from fwp.config import DecoderConfig
from fwp.models.decoder import Decoder

__all__ = ["Decoder", "DecoderConfig"]
