"""What is measured of a model's text, as functions of numbers and strings: no model here."""
