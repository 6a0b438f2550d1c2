"""Speech as log-mel spectrograms for mtdiffusion, and spoken digits to try them on."""
