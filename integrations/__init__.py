"""Plugs into existing training engines; no algorithm lives here."""
