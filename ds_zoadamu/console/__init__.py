"""What a user types and sees at a terminal: command lines, progress."""
