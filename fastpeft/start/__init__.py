"""How methods begin: from a seed (factors), or from the pre-trained weight (pissa, loftq, approximate). Methods import them."""
