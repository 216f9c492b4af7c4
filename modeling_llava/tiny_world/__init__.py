"""The quickstart's world: everything that a LLaVA needs, drawn and written on the spot, and its whole life in minutes."""
