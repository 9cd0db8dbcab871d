"""Exporting plain networks to inference engines."""
