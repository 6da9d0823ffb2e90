"""The plugin in the real SGLang, part by part."""
