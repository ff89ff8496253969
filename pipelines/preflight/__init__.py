"""Checks that run before anything expensive does."""
