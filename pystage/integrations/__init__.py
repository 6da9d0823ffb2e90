"""Plugins that put pystage into engines. Nothing here is imported by pystage itself."""
