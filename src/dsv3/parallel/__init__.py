"""A model over many processes, applied to it from outside (report, section 3.2)."""
