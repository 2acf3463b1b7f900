"""From raw text to the token files that training reads."""
