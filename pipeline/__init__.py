"""The two towers: network, crossings, loss, optimiser, step. Needs torch alone."""
