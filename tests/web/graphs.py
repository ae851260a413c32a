"""The example workflows in the host's API form; ``make_workflows`` turns them into what the frontend saves.

``Graph.note`` is the text of a note inside the workflow. Graphs that need a checkpoint name it there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Link = list[Any]

#: Frozen from their first commit.
NODE_IDS = (
    "ParaTAF_KSampler", "ParaTAF_KSamplerAdvanced", "ParaTAF_Sampler", "ParaTAF_Options", "ParaTAF_SaveTrajectory",
    "ParaTAF_LoadTrajectory", "ParaTAF_KeepTrajectory", "ParaTAF_RecallTrajectory", "ParaTAF_Report", "ParaTAF_Compare",
    "ParaTAF_DemoModel", "ParaTAF_DemoPrompt",
)  # fmt: skip


@dataclass
class Graph:
    """Nodes by number, links by their outputs."""

    note: str
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, **inputs: Any) -> str:
        """A node; returns its number."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs}
        return number


def out(node: str, index: int = 0) -> Link:
    """A link to an output."""
    return [node, index]


def _sampler(g: Graph, model: Link, yes: Link, no: Link, latent: Link, **given: Any) -> str:
    inputs = {"seed": 5, "steps": 20, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
    links = {"model": model, "positive": yes, "negative": no, "latent_image": latent}
    return g.add("ParaTAF_KSampler", **links, **{**inputs, **given})


def _options(g: Graph, **given: Any) -> str:
    plain = {"solver": "auto", "preset": "balanced", "tolerance": 0.003, "target_db": 0.0, "window": 8, "rows": 0,
             "history": 0, "order": 0, "max_rounds": 0}  # fmt: skip
    return g.add("ParaTAF_Options", **{**plain, **given})


def _demo(g: Graph, text: str) -> tuple[str, str, str]:
    model = g.add("ParaTAF_DemoModel", batch_size=1)
    return model, g.add("ParaTAF_DemoPrompt", text=text), g.add("ParaTAF_DemoPrompt", text="")


def _show(g: Graph, latent: Link, vae: Link, name: str) -> str:
    image = g.add("VAEDecode", samples=latent, vae=vae)
    return g.add("SaveImage", images=out(image), filename_prefix=name)


def quickstart() -> Graph:
    g = Graph(
        "## Quickstart\nNothing to download: the demo model is inside the pack. **KSampler (Parallel)** takes the "
        "place of KSampler and gives the same picture in fewer model calls; the comparison on the right holds one "
        "against the other. Whatever you change on one of them, such as the seed, change on both. On a CPU, or a GPU "
        "that one picture fills, the est. speed is below 1×: with window 0 the pack measures, and may leave the plain "
        "sampler in place."
    )
    model, yes, no = _demo(g, "large red circle, dark background")
    given = {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
    options = _options(g, preset="strict")
    ours = _sampler(g, out(model), out(yes), out(no), out(model, 2), options=out(options), **given)
    theirs = g.add("KSampler", model=out(model), positive=out(yes), negative=out(no), latent_image=out(model, 2),
                   seed=5, denoise=1.0, **given)  # fmt: skip
    _show(g, out(ours), out(model, 1), "quickstart")
    report = g.add("ParaTAF_Report", report=out(ours, 2))
    g.add("PreviewImage", images=out(report))
    compare = g.add("ParaTAF_Compare", result=out(ours), reference=out(theirs))
    g.add("PreviewAny", source=out(compare, 3))
    return g


def warm_start() -> Graph:
    g = Graph(
        "## Warm start\nQueue once, then change the CFG, the steps or the sampler a little and queue again: the run "
        "continues from the trajectory that the last one kept, in fewer rounds. Another prompt, even by one word, "
        "gains nothing. An unchanged graph runs once more, from its own trajectory, then it comes from the cache."
    )
    model, yes, no = _demo(g, "large blue square, grey background")
    recall = g.add("ParaTAF_RecallTrajectory", name="mine")
    sampler = _sampler(g, out(model), out(yes), out(no), out(model, 2), trajectory=out(recall), cfg=4.0,
                       options=out(_options(g)))  # fmt: skip
    g.add("ParaTAF_KeepTrajectory", trajectory=out(sampler, 1), name="mine")
    _show(g, out(sampler), out(model, 1), "warm-start")
    return g


def _told(g: Graph, sampler: str) -> None:
    report = g.add("ParaTAF_Report", report=out(sampler, 2))
    g.add("PreviewImage", images=out(report))


def artists_loop() -> Graph:
    g = Graph(
        "## The artist's loop\nThe first sampler draws prompt A. The second one changes the CFG from 4 to 4.6 and "
        "continues from the first one's **trajectory** instead of starting over: its report says in how many rounds. "
        "The comparison on the right holds it against ComfyUI's own KSampler with the same settings.\n\nTry other "
        "tweaks in the second sampler: steps, sampler or a nudge of the CFG gain most, another prompt often nothing."
    )
    model, yes, no = _demo(g, "large magenta diamond, dark background")
    given = {"steps": 30, "sampler_name": "euler", "scheduler": "normal"}
    links = [out(model), out(yes), out(no), out(model, 2)]
    options = _options(g)
    first = _sampler(g, *links, options=out(options), cfg=4.0, **given)
    tweaked = _sampler(g, *links, options=out(options), trajectory=out(first, 1), cfg=4.6, **given)
    plain = g.add("KSampler", model=links[0], positive=links[1], negative=links[2], latent_image=links[3], seed=5,
                  cfg=4.6, denoise=1.0, **given)  # fmt: skip
    for sampler, name in ((first, "loop-a"), (tweaked, "loop-tweaked")):
        _show(g, out(sampler), out(model, 1), name)
        _told(g, sampler)
    compare = g.add("ParaTAF_Compare", result=out(tweaked), reference=out(plain))
    g.add("PreviewAny", source=out(compare, 3))
    return g


def preview_and_refine() -> Graph:
    g = Graph(
        "## Preview and refine\nThe first sampler stops after 3 rounds: a sketch. If you like it, the second one "
        "finishes it from the sketch's **trajectory**. It does not evaluate again what is final already, so that both "
        "together cost about one run, as long as max_rounds stops the first. Both read their seed from the node "
        "**Seed**. While you look for a seed, mute the whole second branch, from its sampler to its pictures (select, "
        "Ctrl+M): of a muted sampler alone its report "
        "misses its input, and ComfyUI refuses the graph."
    )
    model, yes, no = _demo(g, "small white ring, top left, grey background")
    given: dict[str, Any] = {"steps": 24, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    links = [out(model), out(yes), out(no), out(model, 2)]
    seed = g.add("PrimitiveInt", value=5)
    g.nodes[seed]["_meta"] = {"title": "Seed"}
    given["seed"] = out(seed)
    sketch = _sampler(g, *links, options=out(_options(g, max_rounds=3)), **given)
    finished = _sampler(g, *links, options=out(_options(g)), trajectory=out(sketch, 1), **given)
    for sampler, name in ((sketch, "sketch"), (finished, "finished")):
        _show(g, out(sampler), out(model, 1), name)
        _told(g, sampler)
    return g


def custom_advanced() -> Graph:
    g = Graph(
        "## SamplerCustomAdvanced\n**Parallel Sampler** makes any SAMPLER parallel, with its own settings, for every "
        "guider and noise node."
    )
    model, yes, no = _demo(g, "small yellow ring, top right")
    sampler = g.add("SamplerEulerAncestral", eta=0.7, s_noise=1.0)
    parallel = g.add("ParaTAF_Sampler", sampler=out(sampler), options=out(_options(g)))
    sigmas = g.add("BasicScheduler", model=out(model), scheduler="normal", steps=24, denoise=1.0)
    noise = g.add("RandomNoise", noise_seed=11)
    guider = g.add("CFGGuider", model=out(model), positive=out(yes), negative=out(no), cfg=4.0)
    run = g.add("SamplerCustomAdvanced", noise=out(noise), guider=out(guider), sampler=out(parallel),
                sigmas=out(sigmas), latent_image=out(model, 2))  # fmt: skip
    _show(g, out(run), out(model, 1), "sampler-custom-advanced")
    return g


def inpainting() -> Graph:
    g = Graph("## Inpainting\nThe second sampler redraws the masked right half, in parallel, and keeps the left half.")
    model, yes, no = _demo(g, "large green square, dark background")
    other = g.add("ParaTAF_DemoPrompt", text="small magenta triangle, right")
    options = out(_options(g))
    first = _sampler(g, out(model), out(yes), out(no), out(model, 2), cfg=4.0, options=options)
    whole = g.add("SolidMask", value=0.0, width=32, height=32)
    part = g.add("SolidMask", value=1.0, width=16, height=32)
    mask = g.add("MaskComposite", destination=out(whole), source=out(part), x=16, y=0, operation="add")
    masked = g.add("SetLatentNoiseMask", samples=out(first), mask=out(mask))
    second = _sampler(g, out(model), out(other), out(no), out(masked), cfg=4.0, seed=8, options=options)
    _show(g, out(first), out(model, 1), "inpainting-before")
    _show(g, out(second), out(model, 1), "inpainting-after")
    return g


def _needs(**files: Iterable[str]) -> str:
    """What to download, by the folder below models; in bold, for Vue nodes show code unreadably."""
    paths = [f"**{folder}/{name}**" for folder, names in files.items() for name in names]
    return "\n\nNeeds " + ", ".join(paths) + " in ComfyUI's models folder."


def _checkpoint(title: str, file: str, latent: str, size: int, **given: Any) -> Graph:
    g = Graph(
        f"## {title}\nThe usual text-to-image graph with KSampler (Parallel) in the sampler's place."
        f"{_needs(checkpoints=[file])}"
    )
    model = g.add("CheckpointLoaderSimple", ckpt_name=file)
    yes = g.add("CLIPTextEncode", text="a lighthouse on a cliff at dusk, oil painting", clip=out(model, 1))
    no = g.add("CLIPTextEncode", text="blurry, low quality", clip=out(model, 1))
    empty = g.add(latent, width=size, height=size, batch_size=1)
    sampler = _sampler(g, out(model), out(yes), out(no), out(empty), **given)
    _show(g, out(sampler), out(model, 2), title.split()[0].lower())
    return g


def sd15() -> Graph:
    file = "v1-5-pruned-emaonly-fp16.safetensors"
    return _checkpoint("SD 1.5 (SDXL alike)", file, "EmptyLatentImage", 512, steps=30)


def sd35() -> Graph:
    file = "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors"
    return _checkpoint("SD 3.5", file, "EmptySD3LatentImage", 1024, steps=28, cfg=4.5, sampler_name="euler",
                       scheduler="sgm_uniform")  # fmt: skip


def flux() -> Graph:
    files = ("flux1-dev.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors", "ae.safetensors")
    needs = _needs(diffusion_models=files[:1], text_encoders=files[1:3], vae=files[3:])
    g = Graph(f"## Flux\nGuidance is distilled into the model: cfg stays at 1.{needs}")
    model = g.add("UNETLoader", unet_name=files[0], weight_dtype="default")
    clip = g.add("DualCLIPLoader", clip_name1=files[1], clip_name2=files[2], type="flux", device="default")
    vae = g.add("VAELoader", vae_name=files[3])
    text = g.add("CLIPTextEncode", text="a lighthouse on a cliff at dusk, oil painting", clip=out(clip))
    yes = g.add("FluxGuidance", conditioning=out(text), guidance=3.5)
    no = g.add("ConditioningZeroOut", conditioning=out(text))
    empty = g.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    given = {"steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    sampler = _sampler(g, out(model), out(yes), out(no), out(empty), **given)
    _show(g, out(sampler), out(vae), "flux")
    return g


def zimage() -> Graph:
    files = ("z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors")
    needs = _needs(diffusion_models=files[:1], text_encoders=files[1:2], vae=files[2:])
    g = Graph(
        "## Z-Image\nA model distilled to a few steps leaves less to win than one of 30 steps: the report on the right "
        f"says what it was here. Guidance is distilled as well: cfg stays at 1.{needs}"
    )
    model = g.add("UNETLoader", unet_name=files[0], weight_dtype="default")
    clip = g.add("CLIPLoader", clip_name=files[1], type="lumina2", device="default")
    vae = g.add("VAELoader", vae_name=files[2])
    shifted = g.add("ModelSamplingAuraFlow", model=out(model), shift=3.0)
    yes = g.add("CLIPTextEncode", text="a lighthouse on a cliff at dusk, oil painting", clip=out(clip))
    no = g.add("ConditioningZeroOut", conditioning=out(yes))
    empty = g.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    given = {"steps": 9, "cfg": 1.0, "sampler_name": "res_multistep", "scheduler": "simple"}
    sampler = _sampler(g, out(shifted), out(yes), out(no), out(empty), **given)
    report = g.add("ParaTAF_Report", report=out(sampler, 2))
    g.add("PreviewImage", images=out(report))
    _show(g, out(sampler), out(vae), "z-image")
    return g


def wan() -> Graph:
    files = ("wan2.1_t2v_1.3B_fp16.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors")
    needs = _needs(diffusion_models=files[:1], text_encoders=files[1:2], vae=files[2:])
    g = Graph(f"## Wan video\nA video latent is one picture to the sampler: all its frames move together.{needs}")
    model = g.add("UNETLoader", unet_name=files[0], weight_dtype="default")
    clip = g.add("CLIPLoader", clip_name=files[1], type="wan", device="default")
    vae = g.add("VAELoader", vae_name=files[2])
    yes = g.add("CLIPTextEncode", text="waves breaking below a lighthouse", clip=out(clip))
    no = g.add("CLIPTextEncode", text="static, blurry", clip=out(clip))
    shifted = g.add("ModelSamplingSD3", model=out(model), shift=8.0)
    empty = g.add("EmptyHunyuanLatentVideo", width=832, height=480, length=33, batch_size=1)
    given = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple"}
    sampler = _sampler(g, out(shifted), out(yes), out(no), out(empty), **given)
    frames = g.add("VAEDecode", samples=out(sampler), vae=out(vae))
    g.add("SaveAnimatedWEBP", images=out(frames), filename_prefix="wan", fps=16.0, lossless=False, quality=90,
          method="default")  # fmt: skip
    return g


def controlnet() -> Graph:
    files = ("v1-5-pruned-emaonly-fp16.safetensors", "control_v11p_sd15_canny_fp16.safetensors")
    g = Graph(
        "## ControlNet\nA ControlNet that is active for a part of the steps only: the parallel sampler groups the "
        "steps by what is active. Put your canny picture in place of **Empty Image**."
        f"{_needs(checkpoints=files[:1], controlnet=files[1:])}"
    )
    model = g.add("CheckpointLoaderSimple", ckpt_name=files[0])
    yes = g.add("CLIPTextEncode", text="a lighthouse on a cliff at dusk, oil painting", clip=out(model, 1))
    no = g.add("CLIPTextEncode", text="blurry, low quality", clip=out(model, 1))
    net = g.add("ControlNetLoader", control_net_name=files[1])
    image = g.add("EmptyImage", width=512, height=512, batch_size=1, color=8421504)
    both = g.add("ControlNetApplyAdvanced", positive=out(yes), negative=out(no), control_net=out(net), image=out(image),
                 strength=0.8, start_percent=0.1, end_percent=0.7)  # fmt: skip
    empty = g.add("EmptyLatentImage", width=512, height=512, batch_size=1)
    sampler = _sampler(g, out(model), out(both), out(both, 1), out(empty), steps=30)
    _show(g, out(sampler), out(model, 2), "controlnet")
    return g


EXAMPLES = {
    "quickstart": quickstart,
    "warm-start": warm_start,
    "artists-loop": artists_loop,
    "preview-and-refine": preview_and_refine,
    "sampler-custom-advanced": custom_advanced,
    "inpainting": inpainting,
    "sd15": sd15,
    "sd35": sd35,
    "flux": flux,
    "z-image": zimage,
    "wan-video": wan,
    "controlnet": controlnet,
}
