"""Tests of mvpfx: one file a pass, one a noun."""
