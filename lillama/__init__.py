"""Lillama: low-rank compression of trained language models."""
