"""How ranks come to be. Knows no model; imports collectives."""
