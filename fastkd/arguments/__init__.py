"""Arguments: how a number is read, and how a value is quoted in a message."""
