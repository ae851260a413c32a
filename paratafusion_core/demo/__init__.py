"""The embedded problems: a small trained text-to-image network and a closed-form Gaussian mixture."""
