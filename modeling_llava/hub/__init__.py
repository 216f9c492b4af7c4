"""Publication: what may leave this machine, the model card, and the push to the Hub."""
