"""Pretrained models that packages carry: fetched, checked and unpacked once."""
