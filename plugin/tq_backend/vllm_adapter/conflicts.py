"""Other installed packages that hook TurboQuant into vLLM.

Read from package metadata alone: importing such a plugin is what can bring an engine down, as turboquant-vllm 1.5.0 does with
vLLM 0.33 by importing a name that is no longer there.
"""

from __future__ import annotations

from importlib import metadata

GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")


def competitors() -> list[str]:
    """Name and version of each, sorted."""
    found = set()
    for group in GROUPS:
        for point in metadata.entry_points(group=group):
            owner = point.dist.name if point.dist else "an unnamed package"
            if owner != "tq-backend" and "turboquant" in f"{owner} {point.name} {point.value}".lower():
                found.add(f"{owner} {point.dist.version}" if point.dist else owner)
    return sorted(found)


def sentence(names: list[str]) -> str:
    """What is wrong and what to do about it."""
    packages = " ".join(name.split()[0] for name in names)
    return (
        f"{', '.join(names)} also hooks TurboQuant into vLLM, and the last one to load wins; uninstall it (`pip uninstall "
        f"{packages}`), or name the plugins to load in VLLM_PLUGINS"
    )
