"""Predictions against reality. Read from a checkout: it is no part of the installed package."""
