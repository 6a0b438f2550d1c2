"""``mtdiffusion play``: a page to play with a trained run. It needs the extra ``play``, which brings gradio."""
