"""Models: one decoder for all rules."""

from fwp.models.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
