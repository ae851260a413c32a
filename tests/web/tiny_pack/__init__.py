"""A node pack for the tests only: random prompts in place of gigabytes of text encoders."""

from __future__ import annotations

import torch
from comfy_api.latest import ComfyExtension, io


class TinyPrompt(io.ComfyNode):
    """Random CONDITIONING of a given width."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyPrompt",
            category="testing",
            inputs=[io.String.Input("text"), io.Int.Input("width"), io.Int.Input("pooled")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text: str, width: int, pooled: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(len(text))
        cross = torch.randn(1, 8, width, generator=generator)
        return io.NodeOutput([[cross, {"pooled_output": torch.randn(1, pooled, generator=generator)}]])


class _Tiny(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TinyPrompt]


async def comfy_entrypoint() -> ComfyExtension:
    return _Tiny()
