"""Which stages run, in what order, and on what."""
