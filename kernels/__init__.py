"""Operators: one file each, found by listing this directory."""
