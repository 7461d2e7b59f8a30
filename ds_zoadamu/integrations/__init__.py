"""Plugins by which other tools train with forward passes only. Each imports the tool that it is for."""
