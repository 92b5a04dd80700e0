"""Typed job settings and the one path that loads them."""
