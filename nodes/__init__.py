"""The pack's nodes: thin V3 classes, one file a theme. Imported relatively only: plain ``nodes`` is the host's."""
