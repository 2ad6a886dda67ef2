"""The web app: its computations, which know no gradio, and the interface around them."""
