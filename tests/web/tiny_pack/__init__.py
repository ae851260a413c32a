"""A node pack for the tests only: random prompts and tiny models in place of gigabytes."""

from __future__ import annotations

import sys
from pathlib import Path

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


class TinyModel(io.ComfyNode):
    """A tiny model that the host's loaders do not know, for they recognise it by its full width only."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyModel", category="testing", inputs=[io.String.Input("kind")], outputs=[io.Model.Output()]
        )

    @classmethod
    def execute(cls, kind: str) -> io.NodeOutput:
        sys.path.append(str(Path(__file__).resolve().parents[2] / "host"))
        import tiny

        return io.NodeOutput(tiny.configured(kind))


class _Tiny(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TinyPrompt, TinyModel]


async def comfy_entrypoint() -> ComfyExtension:
    return _Tiny()
