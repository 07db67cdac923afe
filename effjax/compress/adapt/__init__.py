"""Adapters: few numbers that train beside a model that stays as it is."""
