"""What ComfyUI loads. Nothing is imported here: tools that only look at the folder (pytest, packagers) load it too."""

from __future__ import annotations

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's extension, in ComfyUI's V3 form."""
    from .nodes.extension import ParaTAFusion

    return ParaTAFusion()
