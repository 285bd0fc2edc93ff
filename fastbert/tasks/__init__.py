"""What a user wants done in one call: texts in, answers out in the order that they came in."""
