"""How well steps are planned."""
