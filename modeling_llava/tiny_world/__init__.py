"""The quickstart's world: everything that a LLaVA needs, drawn and written by a script."""
