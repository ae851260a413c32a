"""The host side of the pack: everything that knows how ComfyUI samples. Only ``nodes`` imports from here."""
