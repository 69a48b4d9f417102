"""Models: finding them, describing their architecture, loading them."""
