"""Plugins that connect pystage to engines. pystage itself imports nothing from here."""
