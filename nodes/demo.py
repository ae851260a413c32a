"""The embedded network as a checkpoint of its own: a first picture without any download."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..paratafusion_core.demo.prompt import VOCABULARY, encode
from .host.demo_model import SIDE, load_demo
from .types import CATEGORY, schema


class DemoModel(io.ComfyNode):
    """The embedded network as a real MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_DemoModel",
            display_name="Demo Model",
            category=CATEGORY,
            description="A small network that draws simple shapes, inside the pack: nothing to download.",
            search_aliases=["test model", "quickstart", "no download", "example model"],
            inputs=[
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64, tooltip="How many pictures the empty latent makes."
                )
            ],
            outputs=[
                io.Model.Output(tooltip="Works with every sampler, patch and guider."),
                io.Vae.Output(tooltip="The network draws pixels: this only turns them into an image."),
                io.Latent.Output(tooltip="An empty latent of the network's size."),
            ],
        )

    @classmethod
    def execute(cls, batch_size: int) -> io.NodeOutput:
        model, vae = load_demo()
        return io.NodeOutput(model, vae, {"samples": torch.zeros(batch_size, 3, SIDE, SIDE)})


class DemoPrompt(io.ComfyNode):
    """A prompt of the embedded network."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ParaTAF_DemoPrompt",
            display_name="Demo Prompt",
            category=CATEGORY,
            description="Words for the Demo Model.",
            search_aliases=["test prompt", "quickstart", "example prompt"],
            inputs=[
                io.String.Input(
                    "text",
                    default="large red circle, dark background",
                    multiline=True,
                    tooltip=f"Any of: {', '.join(VOCABULARY)}. Empty for the negative prompt.",
                )
            ],
            outputs=[io.Conditioning.Output(tooltip="For the positive or negative input of a sampler.")],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        return io.NodeOutput([[encode(text, "text")[None, None], {}]])
