"""Processes: how ranks start, what they say to each other, what ends a wait, and how they end."""
