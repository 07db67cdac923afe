"""The model of a config, whichever architecture it is."""

from effjax.models import config as decoder_config
from effjax.models import decoder, encoder, encoder_config

Config = decoder_config.DecoderConfig | encoder_config.EncoderConfig


def build(config: Config) -> decoder.Decoder | encoder.Encoder:
  """The module of a config."""
  if isinstance(config, encoder_config.EncoderConfig):
    return encoder.Encoder(config)
  return decoder.Decoder(config)
