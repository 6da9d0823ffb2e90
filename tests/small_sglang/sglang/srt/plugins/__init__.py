from sglang.srt.plugins.hook_registry import HookRegistry

PLUGINS = []


def load_plugins():
    plugins, PLUGINS[:] = list(PLUGINS), []
    for plugin in plugins:
        plugin()
    HookRegistry.apply_hooks()
